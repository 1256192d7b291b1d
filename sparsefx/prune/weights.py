"""Which weights of a model may be pruned, and how each one is read as a matrix [out, in].

module               stored as         read as                an input group is
nn.Linear            [out, in]         [out, in]              consecutive columns
transformers Conv1D  [in, out]         transposed             consecutive rows as stored
nn.Conv2d            [K, C, R, S]      [K, R * S * C]         consecutive input channels C
experts              [E, out, in]      [E * out, in]          consecutive columns
experts, transposed  [E, in, out]      [E * out, in]          consecutive rows as stored

A weight of several parts (experts; groups of a convolution, K / groups filters each) is as many
matrices with inputs of their own, one below the other. Experts are the 3-d parameters of a module
that transformers' `use_experts_implementation` has decorated.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

PRUNABLE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class PrunableWeight:
    """One weight that may be pruned.

    name: its parameter name; names: every name it goes by (tied weights have several), `name`
    included; parameter: as stored; axis: the dimension of the parameter that is the input, along
    which groups run; parts: how many matrices it is, with inputs of their own; held_back: why only
    a key that spells out a name selects it, "" where any matching glob does.
    """

    name: str
    names: tuple[str, ...]
    parameter: nn.Parameter
    axis: int
    parts: int = 1
    held_back: str = ""

    @property
    def is_stack(self) -> bool:
        """Whether its parts are layers of their own: experts, not groups of one convolution."""
        return self.parameter.dim() == _STACKED

    @property
    def fit_shape(self) -> torch.Size:
        """[out, channels] of one part: what `Pattern.misfit` must accept, so that no group crosses
        a tap and no block crosses two parts."""
        shape, channels = self.parameter.shape, self.parameter.shape[self.axis]
        if self.is_stack:
            return torch.Size((self.parameter.numel() // shape[0] // channels, channels))
        return torch.Size((shape[1 - self.axis] // self.parts, channels))

    @property
    def columns(self) -> int:
        """How many inputs each output has: the width of the matrix."""
        return self.parameter.numel() // (self.parts * self.fit_shape[0])

    def matrix(self) -> Tensor:
        """The weight as [parts * out, in], detached; a view where the layout allows, or a copy."""
        return self.parameter.detach().movedim(self.axis, -1).reshape(-1, self.columns)

    def matrices(self) -> tuple[Tensor, ...]:
        """The matrix [out, in] of each part, as `matrix()`."""
        return self.matrix().chunk(self.parts)

    def as_stored(self, matrix: Tensor) -> Tensor:
        """A matrix like that of `matrix()` (a mask, say) in the parameter's own shape; a view."""
        shape = list(self.parameter.shape)
        channels = shape.pop(self.axis)
        return matrix.view(*shape, channels).movedim(-1, self.axis)


_STACKED = 3  # dimensions of a stack of experts
_EXPERTS = frozenset({"num_experts", "is_transposed", "has_gate", "has_bias"})
"""What every module that transformers runs as a stack of experts has as attributes of its own."""


def prunable_weights(model: nn.Module) -> dict[str, PrunableWeight]:
    """Every weight of `model` that may be pruned, in module order, by parameter name.

    These are the floating-point (16 bits or more) weights of nn.Linear, transformers' Conv1D,
    nn.Conv2d and stacks of experts. A parameter shared by several modules appears once, under its
    first prunable name. Held back from globs: weights tied to a module of another kind, such as an
    output head that shares its matrix with the embedding, and depthwise convolutions.
    """
    names = _names_by_identity(model)
    found: dict[int, PrunableWeight] = {}
    owned: dict[int, list[str]] = {}
    for name, module, weight in _weights_of_layers(model):
        owned.setdefault(id(weight), []).append(name)
        if id(weight) not in found:
            found[id(weight)] = PrunableWeight(
                name,
                names[id(weight)],
                weight,
                _input_axis(module),
                _parts(module, weight),
                _depthwise(module),
            )
    return {
        weight.name: _hold_back_if_tied(weight, owned[identity])
        for identity, weight in found.items()
    }


def _weights_of_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    for path, module in model.named_modules(remove_duplicate=False):
        is_layer = isinstance(module, nn.Linear | nn.Conv2d) or _is_conv1d(module)
        if not (is_layer or _is_experts(module)):
            continue
        # A parametrized or quantized layer computes `weight` and has no such parameter.
        for name, weight in module.named_parameters(recurse=False):
            if not _has_values(weight):
                continue
            if name == "weight" if is_layer else weight.dim() == _STACKED:
                yield f"{path}.{name}" if path else name, module, weight


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


def _is_experts(module: nn.Module) -> bool:
    return vars(module).keys() >= _EXPERTS


def _has_values(weight: nn.Parameter) -> bool:
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return False
    return weight.dtype in PRUNABLE_DTYPES and weight.numel() > 0


def _input_axis(module: nn.Module) -> int:
    if _is_experts(module):
        return 1 if vars(module)["is_transposed"] else 2
    return 0 if _is_conv1d(module) else 1


def _parts(module: nn.Module, weight: nn.Parameter) -> int:
    if _is_experts(module):
        return weight.shape[0]
    return module.groups if isinstance(module, nn.Conv2d) else 1


def _depthwise(module: nn.Module) -> str:
    if isinstance(module, nn.Conv2d) and module.groups > 1 and module.weight.shape[1] == 1:
        return "depthwise: each filter sees one channel"
    return ""


def _hold_back_if_tied(weight: PrunableWeight, layers: list[str]) -> PrunableWeight:
    others = [name for name in weight.names if name not in layers]
    if not others:
        return weight
    return replace(weight, held_back=f"tied to {others[0]}")
