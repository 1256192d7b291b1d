"""PackedLinear: a linear layer that holds its weight packed, and no dense one.

What `compile(memory="small")` puts in the place of nn.Linear. Its call is one operator of the
dialect, which torch.compile's graphs take as it is and lowering gives to a kernel.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparsefx.errors import ShapeMismatch, WeightIsPacked
from sparsefx.ops import LAYOUT_OPS
from sparsefx.packing import Packing
from sparsefx.patterns import Pattern
from sparsefx.weights import WeightMemo

M = TypeVar("M", bound=nn.Module)


class PackedLinear(nn.Module):
    """x W^T + b with W [out, in] stored as `packing` says; for inference only.

    `weight` unpacks: a new dense tensor at each look, which refuses changes in place. The state
    dict has the dense weight under its usual name; loading one packs it again.
    """

    def __init__(self, linear: nn.Linear, packing: Packing, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packing = packing
        self.bias = linear.bias
        self.training = linear.training
        for name, tensor in zip(packing.parts, tensors, strict=True):
            self.register_buffer(name, tensor, persistent=False)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The packed tensors, in the order of `packing.parts`."""
        return tuple(self.get_buffer(name) for name in self.packing.parts)

    @property
    def weight(self) -> Tensor:
        """The dense weight, unpacked for this look."""
        dense = self.packing.unpack(self.tensors, self.in_features)
        return dense if torch.compiler.is_compiling() else dense.as_subclass(_Unpacked)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        packing, stored = self.packing, list(self.tensors)
        scales = stored.pop() if packing.values else None
        numbers = {"nm": (packing.n, packing.m), "block": packing.block}.get(packing.layout, ())
        operator = LAYOUT_OPS[packing.layout]
        codes = {"scales": scales, "kind": packing.values, "group": packing.group}
        result: Tensor = operator(
            x, *stored, self.bias, *numbers, "", [], **(codes if packing.values else {})
        )
        return result

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module has it; refuses another dense weight."""
        if name == "weight":
            raise WeightIsPacked(what="a new weight cannot be assigned")
        super().register_parameter(name, param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """As nn.Module has it; codes go along as bits: `half()` converts weights, not codes."""
        codes = self.get_buffer("values").dtype
        is_float = codes is torch.float8_e4m3fn
        if is_float:
            self.register_buffer("values", self.tensors[0].view(torch.int8), persistent=False)
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            if is_float:
                self.register_buffer("values", self.tensors[0].view(codes), persistent=False)
        return self

    def extra_repr(self) -> str:
        """As nn.Linear writes it, and how the weight is stored."""
        stored = self.packing.values or "as they are"
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bias={self.bias is not None}, {self.packing.layout}, values {stored}"

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination[f"{prefix}weight"] = self.packing.unpack(self.tensors, self.in_features)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = dict(state_dict)
        weight = given.pop(f"{prefix}weight", None)
        if weight is None:
            missing_keys.append(f"{prefix}weight")
        elif tuple(weight.shape) != (self.out_features, self.in_features):
            error_msgs.append(f"{prefix}weight has shape {tuple(weight.shape)}")
        else:
            self._load(weight, prefix, error_msgs)
        super()._load_from_state_dict(
            given, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if f"{prefix}weight" in unexpected_keys:
            unexpected_keys.remove(f"{prefix}weight")

    def _load(self, weight: Tensor, prefix: str, error_msgs: list[str]) -> None:
        dense = weight.detach().to(self.tensors[-1 if self.packing.values else 0].dtype)
        try:
            loaded = self.packing.pack(dense.to(self.tensors[0].device))
        except ShapeMismatch as error:
            error_msgs.append(f"{prefix}weight does not fit the packed layer: {error}")
            return
        for name, tensor in zip(self.packing.parts, loaded, strict=True):
            self.register_buffer(name, tensor, persistent=False)


class _Unpacked(Tensor):
    """A look at a packed weight: changing it would change nothing, so it refuses."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.startswith("__")
        if (in_place or name in ("__setitem__", "__set__")) and isinstance(args[0], cls):
            raise WeightIsPacked(what=f"{name} would change a copy of it")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def with_packed_weights(model: M, patterns: Mapping[str, Pattern]) -> M:
    """A copy of `model` whose sparse nn.Linear layers hold packed weights alone.

    Weights that stay dense are shared with `model`; so are buffers. A weight that two layers share,
    and one whose packed form would not be smaller, stay dense. patterns: parameter name -> what was
    decided for it. The copy's parameters want no gradients.
    """
    shared: dict[int, object] = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=False)
        for parameter in model.parameters()
    }
    shared |= {id(buffer): buffer for buffer in model.buffers()}
    twin = copy.deepcopy(model, shared)
    uses: dict[int, int] = {}
    for _, parameter in twin.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for path, module in list(twin.named_modules()):
        if type(module) is nn.Linear and path and uses[id(module.weight)] == 1:
            _pack(twin, path, module, patterns.get(f"{path}.weight"))
    return twin


def _pack(model: nn.Module, path: str, linear: nn.Linear, hint: Pattern | None) -> None:
    weight = linear.weight.detach()
    pattern = WeightMemo().found(weight, False, hint).pattern
    if pattern is None or not _is_plain(linear):
        return
    packing = Packing.of(pattern)
    tensors = packing.pack(weight)
    if sum(tensor.nbytes for tensor in tensors) < weight.nbytes:
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, PackedLinear(linear, packing, tensors))


def _is_plain(linear: nn.Linear) -> bool:
    """Without hooks and parametrisations, which would be lost."""
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks)
    return not any(hooks) and set(linear._parameters) == {"weight", "bias"}
