"""packed -> packed:  relu(nm_linear(x, ..., epilogue, extras))
                =>  nm_linear(x, ..., epilogue;relu, extras)

The same for silu, gelu, `y + residual`, `y * gate` and `y * number`, and for the other layouts.
Runs after packing. An inactive dropout behind a linear is passed over. The linear must have no
other user, and the operand of + and * must have the linear's shape and dtype (a kernel
reads it where it stores).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sparsefx.epilogue import Step, join, parse
from sparsefx.mutation import mutates_between
from sparsefx.ops import PACKED_OPS
from sparsefx.passes.attention_scores import is_training
from sparsefx.passes.attention_spelling import source, step
from sparsefx.pipeline import PassContext
from sparsefx.rewrite import Rule, Site, Var, call, erase, rewrite
from sparsefx.shapes import same

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseEpilogue:
    """Moves element-wise followers of a packed linear into it."""

    name: str = "fuse_epilogue"
    stage: str = "folded"

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> int:
        """Returns how many nodes were absorbed."""
        _pass_dropouts(gm)
        return rewrite(gm, _RULES, self.name, ctx.decline)


def _pass_dropouts(gm: fx.GraphModule) -> None:
    """Removes inactive dropouts of packed linears: they stand between a linear and a residual."""
    for node in list(gm.graph.nodes):
        if step(node) != "dropout" or is_training(node):
            continue
        linear = source(node)
        if linear is not None and linear.target in PACKED_OPS:
            node.replace_all_uses_with(linear)
            erase(gm, node)


def _activation(name: str) -> Callable[[Site, fx.Node], fx.Node | None]:
    def build(site: Site, y: fx.Node) -> fx.Node | None:
        return _append(site, y, name)

    return build


def _binary(name: str) -> Callable[..., fx.Node | None]:
    """y op other, with the packed linear on either side (+ and * commute)."""

    def build(site: Site, y: fx.Node, other: object) -> fx.Node | None:
        if isinstance(other, int | float):
            return _append(site, y, "scale", float(other)) if name == "mul" else None
        assert isinstance(other, fx.Node)
        for linear, operand in ((other, y), (y, other)):
            fused = _append(site, linear, name, operand) if operand is not linear else None
            if fused is not None:
                return fused
        return None

    return build


def _divide(site: Site, y: fx.Node, other: object) -> fx.Node | None:
    """y / c = y * (1 / c), exact where c is a power of two, else within rounding."""
    if isinstance(other, int | float) and other != 0:
        return _append(site, y, "scale", 1.0 / float(other))
    return None


def _append(
    site: Site, linear: fx.Node, op: str, operand: fx.Node | float | None = None
) -> fx.Node | None:
    """The packed linear with one more step, or None if it cannot take it."""
    if linear.target not in PACKED_OPS or len(linear.users) != 1:
        return None
    if mutates_between(linear, site.root):
        return None  # the fused linear would read its input after the change
    *head, epilogue, extras = linear.args
    assert isinstance(epilogue, str) and isinstance(extras, list | tuple)
    extras = list(extras)
    if isinstance(operand, fx.Node):
        if not _same_layout(site.root, linear, operand):
            return None
        extras.append(operand)
        added = Step(op, len(extras) - 1)
    else:
        added = Step(op, operand)
    if site.root.meta["val"].dtype != linear.meta["val"].dtype:
        return None
    text = join((*parse(epilogue), added))
    node = site.call(linear.target, *head, text, extras)
    node.kwargs = linear.kwargs
    for key in ("sparsefx_row", "sparsefx_weight", "sparsefx_packing", "nn_module_stack"):
        if key in linear.meta:
            node.meta[key] = linear.meta[key]
    return node


def _same_layout(root: fx.Node, linear: fx.Node, operand: fx.Node) -> bool:
    values = [node.meta["val"] for node in (root, linear, operand)]
    if not all(isinstance(value, Tensor) for value in values):
        return False
    first, *rest = values
    return all(
        len(v.shape) == len(first.shape)
        and all(same(a, b) for a, b in zip(v.shape, first.shape, strict=True))
        and v.dtype == first.dtype
        for v in rest
    )


_y, _other = Var("y"), Var("other")
_RULES = (
    Rule(call(aten.relu.default)(_y), _activation("relu")),
    Rule(call(aten.silu.default)(_y), _activation("silu")),
    Rule(call(aten.gelu.default)(_y, "none"), _activation("gelu")),
    Rule(call(aten.gelu.default)(_y, "tanh"), _activation("gelu_tanh")),
    Rule(call(aten.add.Tensor)(_y, _other, 1), _binary("add")),
    Rule(call(aten.mul.Tensor)(_y, _other), _binary("mul")),
    Rule(call(aten.div.Tensor)(_y, _other), _divide),
)
