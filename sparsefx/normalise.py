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
    operator.matmul: aten.matmul.default,
    torch.conv1d: aten.conv1d.default,
    torch.conv2d: aten.conv2d.default,
    torch.conv3d: aten.conv3d.default,
    F.scaled_dot_product_attention: aten.scaled_dot_product_attention.default,
    torch._C._nn.scaled_dot_product_attention: aten.scaled_dot_product_attention.default,
    torch.softmax: aten.softmax.int,
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
    if node.target is F.softmax:
        overload = aten.softmax.int
    if overload is None or not _fits(node, overload):
        return
    kwargs = _known_kwargs(node, overload)
    if kwargs is None:
        return
    node.op, node.target, node.kwargs = "call_function", overload, kwargs


def _fits(node: fx.Node, overload: torch._ops.OpOverload) -> bool:
    """Whether the call means the overload: `2 * n` on sizes or in-place variants do not."""
    if not isinstance(node.meta.get("val"), torch.Tensor) or not node.args:
        return False
    first = node.args[0]
    if not isinstance(first, fx.Node) or not isinstance(first.meta.get("val"), torch.Tensor):
        return False
    if overload in _BINARY:
        return len(node.args) == 2 and _is_operand(node.args[1])
    return True


def _is_operand(value: object) -> bool:
    if isinstance(value, fx.Node):
        return isinstance(value.meta.get("val"), torch.Tensor)
    return isinstance(value, int | float)


def _known_kwargs(node: fx.Node, overload: torch._ops.OpOverload) -> dict[str, Argument] | None:
    """The call's keyword arguments under the overload's names, or None if one has no place."""
    legal = {argument.name for argument in overload._schema.arguments}
    kwargs = dict(node.kwargs)
    if kwargs.get("inplace") is False:
        del kwargs["inplace"]
    if len(node.args) + len(kwargs) > len(legal):
        return None
    return kwargs if set(kwargs) <= legal else None
