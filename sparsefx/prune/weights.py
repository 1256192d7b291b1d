"""Which weights of a model may be pruned, and how each one is read as a matrix [out, in].

module               stored as         read as            an input group is
nn.Linear            [out, in]         [out, in]          consecutive columns
transformers Conv1D  [in, out]         transposed         consecutive rows as stored
nn.Conv2d            [K, C, R, S]      [K, R * S * C]     consecutive input channels C
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

PRUNABLE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class PrunableWeight:
    """One weight that may be pruned.

    name: its parameter name; names: every name it goes by (tied weights have several), `name`
    included; parameter: as stored; axis: the dimension of the parameter that is the input, along
    which groups run; held_back: why only a key that spells out a name selects it, "" where any
    matching glob does.
    """

    name: str
    names: tuple[str, ...]
    parameter: nn.Parameter
    axis: int
    held_back: str = ""

    @property
    def fit_shape(self) -> torch.Size:
        """[out, channels]: what `Pattern.misfit` must accept, so that no group crosses a tap."""
        return torch.Size((self.parameter.shape[1 - self.axis], self.parameter.shape[self.axis]))

    def matrix(self) -> Tensor:
        """The weight as [out, in], detached; a view where the layout allows, else a copy."""
        moved = self.parameter.detach().movedim(self.axis, -1)
        return moved.reshape(moved.shape[0], prod(moved.shape[1:]))

    def as_stored(self, matrix: Tensor) -> Tensor:
        """A matrix like that of `matrix()` (a mask, say) in the parameter's own shape; a view."""
        shape = list(self.parameter.shape)
        channels = shape.pop(self.axis)
        return matrix.view(*shape, channels).movedim(-1, self.axis)


def prunable_weights(model: nn.Module) -> dict[str, PrunableWeight]:
    """Every weight of `model` that may be pruned, in module order, by parameter name.

    These are the floating-point (16 bits or more) weights of nn.Linear, transformers' Conv1D and
    nn.Conv2d. A parameter shared by several modules appears once, under its first prunable name.
    Held back from globs: weights tied to a module of another kind, such as an output head that
    shares its matrix with the embedding, and depthwise convolutions.
    """
    names = _names_by_identity(model)
    found: dict[int, PrunableWeight] = {}
    owned: dict[int, list[str]] = {}
    for name, module, weight in _weights_of_layers(model):
        owned.setdefault(id(weight), []).append(name)
        if id(weight) not in found:
            found[id(weight)] = PrunableWeight(
                name, names[id(weight)], weight, _input_axis(module), _depthwise(module)
            )
    return {
        weight.name: _hold_back_if_tied(weight, owned[identity])
        for identity, weight in found.items()
    }


def _weights_of_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    for path, module in model.named_modules(remove_duplicate=False):
        if not (isinstance(module, nn.Linear | nn.Conv2d) or _is_conv1d(module)):
            continue
        # A parametrized or quantized layer computes `weight` and has no such parameter.
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is not None and _has_values(weight):
            yield f"{path}.weight" if path else "weight", module, weight


def _names_by_identity(model: nn.Module) -> dict[int, tuple[str, ...]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {identity: tuple(found) for identity, found in names.items()}


def _is_conv1d(module: nn.Module) -> bool:
    # By name, because importing transformers costs seconds and it is no dependency of ours.
    return any(
        base.__name__ == "Conv1D" and base.__module__ == "transformers.pytorch_utils"
        for base in type(module).__mro__
    )


def _has_values(weight: nn.Parameter) -> bool:
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return False
    return weight.dtype in PRUNABLE_DTYPES and weight.numel() > 0


def _input_axis(module: nn.Module) -> int:
    return 0 if _is_conv1d(module) else 1


def _depthwise(module: nn.Module) -> str:
    if isinstance(module, nn.Conv2d) and module.groups > 1 and module.weight.shape[1] == 1:
        return "depthwise: each filter sees one channel"
    return ""


def _hold_back_if_tied(weight: PrunableWeight, layers: list[str]) -> PrunableWeight:
    others = [name for name in weight.names if name not in layers]
    if not others:
        return weight
    reason = f"tied to {others[0]}"
    return PrunableWeight(weight.name, weight.names, weight.parameter, weight.axis, reason)
