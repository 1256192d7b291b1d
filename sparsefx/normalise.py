"""Any captured graph -> the normal form: the operators that passes look at are aten overloads.

torch.export gives aten overloads already; Dynamo gives `torch._C._nn.linear`, `operator.add`,
`Tensor.mul` and so on. One table brings them to the same overloads. Operators that no pass looks at
stay as captured (docs/decisions/0002-normal-form.md says why nothing is traced anew).
"""

import operator

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.node import Argument

aten = torch.ops.aten

_FUNCTIONS: dict[object, torch._ops.OpOverload] = {
    F.linear: aten.linear.default,
    torch._C._nn.linear: aten.linear.default,
    torch.addmm: aten.addmm.default,
    torch.matmul: aten.matmul.default,
    torch.mm: aten.mm.default,
    operator.matmul: aten.matmul.default,
    F.scaled_dot_product_attention: aten.scaled_dot_product_attention.default,
    torch._C._nn.scaled_dot_product_attention: aten.scaled_dot_product_attention.default,
    torch.softmax: aten.softmax.int,
    F.softmax: aten.softmax.int,
    F.relu: aten.relu.default,
    torch.relu: aten.relu.default,
    F.silu: aten.silu.default,
    F.gelu: aten.gelu.default,
    torch._C._nn.gelu: aten.gelu.default,
    operator.add: aten.add.Tensor,
    torch.add: aten.add.Tensor,
    operator.mul: aten.mul.Tensor,
    torch.mul: aten.mul.Tensor,
    operator.truediv: aten.div.Tensor,
    torch.div: aten.div.Tensor,
}
_METHODS: dict[str, torch._ops.OpOverload] = {
    "matmul": aten.matmul.default,
    "mm": aten.mm.default,
    "softmax": aten.softmax.int,
    "relu": aten.relu.default,
    "add": aten.add.Tensor,
    "mul": aten.mul.Tensor,
    "div": aten.div.Tensor,
}
_BINARY = frozenset({aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor})


def normalise(gm: fx.GraphModule) -> fx.GraphModule:
    """Rewrites `gm` in place; every tensor node gets `meta["val"]`. Returns `gm`."""
    for node in gm.graph.nodes:
        if "val" not in node.meta and "example_value" in node.meta:
            node.meta["val"] = node.meta["example_value"]
        _to_overload(node)
    gm.recompile()
    return gm


def _to_overload(node: fx.Node) -> None:
    if node.op == "call_function":
        overload = _FUNCTIONS.get(node.target)
    elif node.op == "call_method":
        overload = _METHODS.get(str(node.target))
    else:
        return
    if overload is None:
        return
    arguments = _arguments(node, overload)
    if arguments is None or not _fits(node, overload, arguments[0]):
        return
    node.op, node.target = "call_function", overload
    node.args, node.kwargs = arguments


def _fits(node: fx.Node, overload: torch._ops.OpOverload, args: tuple[Argument, ...]) -> bool:
    """Whether the call means the overload: `2 * n` on sizes or in-place variants do not."""
    if not isinstance(node.meta.get("val"), torch.Tensor) or not args:
        return False
    first = args[0]
    if not isinstance(first, fx.Node) or not isinstance(first.meta.get("val"), torch.Tensor):
        return False
    if overload in _BINARY:
        return len(args) == 2 and _is_operand(args[1])
    if overload is aten.softmax.int:
        return len(args) > 1 and isinstance(args[1], int)  # F.softmax may guess its dimension
    return True


def _is_operand(value: object) -> bool:
    if isinstance(value, fx.Node):
        return isinstance(value.meta.get("val"), torch.Tensor)
    return isinstance(value, int | float)


def _arguments(
    node: fx.Node, overload: torch._ops.OpOverload
) -> tuple[tuple[Argument, ...], dict[str, Argument]] | None:
    """The call's arguments as the overload takes them, or None if one has no place.

    Positional ones come by position, however they were given: passes read them there.
    """
    kwargs = dict(node.kwargs)
    if kwargs.get("inplace") is False:
        del kwargs["inplace"]
    kwargs.pop("_stacklevel", None)  # nn.Softmax gives it: the depth of a warning
    schema = overload._schema.arguments
    positional = [argument.name for argument in schema if not argument.kwarg_only]
    if len(node.args) > _positions(node.target, positional):
        return None
    args = list(node.args)
    for name in positional[len(args) :]:
        if name not in kwargs:
            break
        args.append(kwargs.pop(name))
    later = {argument.name for argument in schema} - set(positional[: len(args)])
    return (tuple(args), kwargs) if set(kwargs) <= later else None


def _positions(target: object, positional: list[str]) -> int:
    """How many positional arguments mean the same to the call and to the overload."""
    return 2 if target is F.softmax else len(positional)  # its third is the depth of a warning
