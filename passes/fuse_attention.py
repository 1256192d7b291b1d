"""dense -> dense:  dropout(softmax(q @ k.transpose(-2, -1) * scale + mask)) @ v
                 =>  scaled_dot_product_attention(q, k, v, mask, scale=scale)

In the spellings of attention_spelling.py: masks that are added, filled in or chosen by where(), a
scale before or after the product, casts around the softmax. K and V whose heads were repeated to
those of Q are read before that, with enable_gqa=True; the same for the
scaled_dot_product_attention that a model calls with repeated heads. Runs before
`threshold_softmax`, which then has one kind of attention to look at.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from sparsefx.attention.operators import attention_output
from sparsefx.attention.sites import shape_text
from sparsefx.candidates import ATTENTION
from sparsefx.mutation import mutates
from sparsefx.passes.attention_build import Builder
from sparsefx.passes.attention_scores import (
    Scores,
    Weights,
    checks_of,
    read_scores,
    read_weights,
    users_of,
)
from sparsefx.passes.attention_spelling import (
    Repeat,
    alike,
    cast_of,
    repeated_heads,
    step,
    untransposed,
)
from sparsefx.pipeline import PassContext
from sparsefx.rewrite import Decline, Site, arguments
from sparsefx.shapes import same

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseAttention:
    """Makes one scaled_dot_product_attention, with K and V as they are stored, of each attention.

    The results agree to rounding; a row that sees no key at all is 0 where the model gave NaN.
    """

    name: str = "fuse_attention"
    stage: str = "dense"

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> int:
        """Returns how many attentions were fused, or got their K and V back."""
        count = 0
        for node in list(gm.graph.nodes):
            fused: fx.Node | Decline | None
            if node.target is ATTENTION:
                fused = _ungroup(Site(gm, node, self.name))
            elif node.target is aten.softmax.int:
                fused = _fuse(gm, node, self.name)
            else:
                continue
            if isinstance(fused, Decline):
                ctx.decline(node, fused.reason)
            elif fused is not None:
                count += 1
                if "sparsefx_row" in fused.meta:
                    ctx.update(fused, shape=shape_text(fused))
        return count


def _fuse(gm: fx.GraphModule, softmax: fx.Node, author: str) -> fx.Node | Decline:
    found = _read(softmax)
    if isinstance(found, Decline):
        return found
    scores, weights = found
    builder = Builder(Site(gm, weights.root, author))
    nodes = {*scores.nodes, *weights.nodes}
    operands = _operands(builder, scores, weights, nodes)
    if isinstance(operands, Decline):
        return operands
    q, k, v = operands
    mask = builder.mask(scores.terms, q.meta["val"])
    fused = _attention(builder, (q, k, v), mask, scores.scale)
    if "sparsefx_row" in softmax.meta:
        fused.meta["sparsefx_row"] = softmax.meta["sparsefx_row"]
    _replace(builder, fused, nodes)
    return fused


def _read(softmax: fx.Node) -> tuple[Scores, Weights] | Decline:
    """The attention around a softmax, if all of it may go."""
    x, axis, _dtype = arguments(softmax)
    assert isinstance(x, fx.Node)
    scores = read_scores(x)
    if isinstance(scores, Decline):
        return scores
    if axis not in (-1, x.meta["val"].dim() - 1):
        return Decline("attention: its softmax is over another axis than the keys")
    weights = read_weights(softmax)
    if isinstance(weights, Decline):
        return weights
    product, nodes = scores.nodes[0], {*scores.nodes, *weights.nodes}
    if any(users_of(node) != users_of(node)[:1] for node in scores.nodes):
        return Decline("attention: its scores are used by something else too")
    if not alike(product, x):
        return Decline("attention: its mask has more axes, or sizes, than its scores")
    needed = min(_bytes(weights.root), torch.float32.itemsize)
    if any(_bytes(node) < needed for node in nodes):
        return Decline("attention: its softmax has a lower precision than its result")
    if _changes(product, weights.root, nodes):
        return Decline("attention: something is changed in place in the middle of it")
    return scores, weights


def _operands(
    builder: Builder, scores: Scores, weights: Weights, nodes: set[fx.Node]
) -> tuple[fx.Node, fx.Node, fx.Node] | Decline:
    """q, k, v of [batch, heads, length, dim], K and V as before their heads were repeated."""
    root, v = weights.root, weights.value
    dtype = root.meta["val"].dtype
    q, right = (_uncast(each, dtype) for each in (scores.left, scores.right))
    stored = untransposed(right)
    k = right if stored is None else _uncast(stored, dtype)
    if any(each.meta["val"].dtype != dtype for each in (q, k, v)):
        return Decline("attention: q, k and v are not of one dtype")
    shapes = [each.meta["val"].shape for each in (q, k, v)]
    if not all(same(shapes[0][0], shape[0]) for shape in shapes):
        return Decline("attention: q, k and v differ in their batch")
    heads = [shape[1] for shape in shapes]
    if not same(heads[1], heads[2]) or not (same(heads[0], heads[1]) or same(heads[1], 1)):
        return Decline("attention: heads of q, k and v do not fit together")
    for tensor, divides in scores.tensors:
        if tensor.meta["val"].dim() and tensor.meta["val"].dtype != dtype:
            return Decline("attention: its scores are multiplied by a tensor of another dtype")
        q = builder.binary(aten.div.Tensor if divides else aten.mul.Tensor, q, tensor)
    nodes |= {scores.left, scores.right, right} - {q, k}
    if stored is None:
        return q, builder.swapped(k, 2, 3), v
    return q, *_stored(builder, k, v, nodes)


def _stored(
    builder: Builder, k: fx.Node, v: fx.Node, nodes: set[fx.Node]
) -> tuple[fx.Node, fx.Node]:
    """K and V before their heads were repeated, if both were and nothing was changed since."""
    of_k, of_v = _repeat(k), _repeat(v)
    if of_k is None or of_v is None or not same(of_k.heads, of_v.heads):
        return k, v
    gone = {*of_k.nodes, *of_v.nodes}
    if any(_changes(node, builder.site.root, {*nodes, *gone}) for node in gone):
        return k, v
    nodes |= gone
    stored_k, stored_v = (
        builder.swapped(each.x, 1, 2) if each.axis == 2 else each.x for each in (of_k, of_v)
    )
    return stored_k, stored_v


def _repeat(node: fx.Node) -> Repeat | None:
    """How the heads of K or V were repeated, also if before axes 1 and 2 were exchanged."""
    here = repeated_heads(node)
    if here is not None:
        return here if here.axis == 1 else None
    x = untransposed(node, 1, 2)
    before = repeated_heads(x) if x is not None else None
    if before is None or before.axis != 2:
        return None
    return replace(before, nodes=(node, *before.nodes))


def _attention(
    builder: Builder, operands: tuple[fx.Node, fx.Node, fx.Node], mask: fx.Node | None, scale: float
) -> fx.Node:
    q, k, v = operands
    grouped = not same(q.meta["val"].shape[1], k.meta["val"].shape[1])
    value = attention_output(*(each.meta["val"] for each in operands))
    options = {"scale": scale, **({"enable_gqa": True} if grouped else {})}
    return builder.node(ATTENTION, value, q, k, v, mask, **options)


def _ungroup(site: Site) -> fx.Node | None:
    """The attention with K and V as they were before their heads were repeated to those of Q."""
    q, k, v, *others = arguments(site.root)
    if not all(isinstance(each, fx.Node) for each in (q, k, v)):
        return None
    assert isinstance(k, fx.Node) and isinstance(v, fx.Node)
    nodes = {site.root}
    stored = _stored(Builder(site), k, v, nodes)
    if stored == (k, v):
        return None
    mask, dropout, is_causal, scale, _grouped = others
    fused = site.call(ATTENTION, q, *stored, mask, dropout, is_causal)
    fused.kwargs = {"enable_gqa": True} if scale is None else {"scale": scale, "enable_gqa": True}
    site.root.replace_all_uses_with(fused)
    _erase(site.gm, nodes)
    return fused


def _replace(builder: Builder, fused: fx.Node, nodes: set[fx.Node]) -> None:
    builder.keep_views(fused)
    builder.site.root.replace_all_uses_with(fused)
    _erase(builder.site.gm, nodes)


def _erase(gm: fx.GraphModule, nodes: set[fx.Node]) -> None:
    """Removes those of `nodes` that nothing needs any more; some are in place, or methods."""
    for node in reversed(list(gm.graph.nodes)):
        if node in nodes and not users_of(node):
            for check in checks_of(node):
                gm.graph.erase_node(check)
            gm.graph.erase_node(node)


def _uncast(node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """What was only widened for the product: attention adds up in float32 by itself."""
    x = cast_of(node)
    return x if x is not None and _is(x, dtype) and not _is(node, dtype) else node


def _is(node: fx.Node, dtype: torch.dtype) -> bool:
    return bool(node.meta["val"].dtype == dtype)


def _bytes(node: fx.Node) -> int:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value.element_size()


def _changes(first: fx.Node, last: fx.Node, nodes: set[fx.Node]) -> bool:
    """Whether anything but `nodes` may write to a tensor between two nodes.

    torch.export detaches constants in place, which writes no number.
    """
    node = first.next
    while node is not last:
        if node.op == "root" or (node not in nodes and step(node) != "detach" and mutates(node)):
            return True
        node = node.next
    return False
