"""Operators that act alike on every index of an axis, as Ties.

linear     x[..i] w[oi] b[o] -> y[..o]      batch_norm  x[nc..] g[c] b[c] mean[c] var[c] -> y[nc..]
pointwise  x[abc] y[.bc]     -> z[abc]      attention   q[bhle] k[bhse] v[bhsd] -> o[bhld]
conv       x[ni.] w[oi.] b[o] -> y[no.]     depthwise   x[nc.] w[c..] b[c] -> y[nc.]
"""

from collections.abc import Callable

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.node import Argument

from sparsefx.candidates import ATTENTION, CONVOLUTIONS
from sparsefx.prune.permute.relations import (
    Letters,
    Relations,
    aligned,
    holds_tensor,
    shape_of,
    tie,
    unknown,
)
from sparsefx.rewrite import Decline, arguments

aten = torch.ops.aten


def pointwise(node: fx.Node) -> Relations:
    """Every operand, broadcast, with the result; declines the sum of a residual connection."""
    operands = [x for x in arguments(node) if isinstance(x, fx.Node) and holds_tensor(x)]
    if node.target in _SUMS and _is_residual(node, operands):
        return Decline(f"its channels are those of the residual stream ({node.name}), one for all")
    assert isinstance(node.target, OpOverload)
    if node.target._schema.is_mutable and operands[0].op == "get_attr":
        return Decline(f"{operands[0].target} is changed in place")
    result = shape_of(node)
    return tie((node, tuple(range(len(result)))), *((x, aligned(x, result)) for x in operands))


_SUMS = frozenset({aten.add.Tensor, aten.add_.Tensor, aten.sub.Tensor, aten.sub_.Tensor})


def _is_residual(node: fx.Node, operands: list[fx.Node]) -> bool:
    """Whether one operand is a branch off the other that goes through a product with weights."""
    if len(operands) < 2:
        return False
    first, second = operands
    return _branches(first, second, node) or _branches(second, first, node)


def _branches(trunk: fx.Node, branch: fx.Node, end: fx.Node) -> bool:
    reached, node = {trunk: False}, trunk.next
    while node is not end:
        sources = [source for source in node.all_input_nodes if source in reached]
        if sources:
            product = node.target in _PRODUCTS or node.target in CONVOLUTIONS
            reached[node] = product or any(reached[source] for source in sources)
        node = node.next
    return reached.get(branch, False)


def _same(node: fx.Node) -> Relations:
    letters = _batch(node, 0)
    return tie((node.args[0], letters), (node, letters))


def _dropout(node: fx.Node) -> Relations:
    return unknown(node, "active ") if arguments(node)[2] else _same(node)


def _batch(node: fx.Node, inner: int) -> Letters:
    """Letters of all axes of the result but the last `inner`."""
    return tuple(range(len(shape_of(node)) - inner))


def _linear(node: fx.Node) -> Relations:
    x, w, b = arguments(node)
    batch = _batch(node, 1)
    return tie((x, (*batch, "i")), (w, ("o", "i")), (b, ("o",)), (node, (*batch, "o")))


def _addmm(node: fx.Node) -> Relations:
    b, x, w = arguments(node)[:3]
    assert isinstance(b, fx.Node)
    names = ("r", "o")
    bias = tuple(None if axis is None else names[int(axis)] for axis in aligned(b, shape_of(node)))
    return tie((b, bias), (x, ("r", "i")), (w, ("i", "o")), (node, ("r", "o")))


def _matmul(node: fx.Node) -> Relations:
    a, b = arguments(node)[:2]
    assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
    if min(len(shape_of(a)), len(shape_of(b))) < 2:
        return unknown(node, "a vector in ")
    batch = (*shape_of(node)[:-2],)
    left, right = (_batch_letters(x, batch) for x in (a, b))
    result = (*_batch(node, 2), "r", "o")
    return tie((a, (*left, "r", "i")), (b, (*right, "i", "o")), (node, result))


def _batch_letters(operand: fx.Node, batch: tuple[int, ...]) -> Letters:
    shape = shape_of(operand)[:-2]
    skip = len(batch) - len(shape)
    return tuple(skip + a if size == batch[skip + a] else None for a, size in enumerate(shape))


def _convolution(node: fx.Node) -> Relations:
    assert isinstance(node.target, OpOverload)
    names = (argument.name for argument in node.target._schema.arguments)
    given = dict(zip(names, arguments(node), strict=True))
    x, w, b, groups = (given[name] for name in ("input", "weight", "bias", "groups"))
    assert isinstance(x, fx.Node) and isinstance(w, fx.Node)
    image: Letters = (None,) * (len(shape_of(w)) - 2)
    if len(shape_of(x)) != len(image) + 2:
        return unknown(node, "an unbatched ")
    if groups == 1:
        transposed = "transpose" in node.target._schema.name
        io = ("i", "o") if transposed else ("o", "i")
        result = ("n", "o", *image)
        return tie((x, ("n", "i", *image)), (w, (*io, *image)), (b, ("o",)), (node, result))
    if groups == shape_of(x)[1] == shape_of(node)[1]:
        alike = ("n", "c", *image)
        return tie((x, alike), (w, ("c", None, *image)), (b, ("c",)), (node, alike))
    return unknown(node, "the groups of ")


def _attention(node: fx.Node) -> Relations:
    q, k, v, mask, dropout, _causal, _scale, grouped = arguments(node)
    operands = [x for x in (q, k, v) if isinstance(x, fx.Node)]
    result = shape_of(node)
    if dropout or grouped or len(result) != 4:
        return unknown(node, "active dropout or grouped heads in ")
    if any(shape_of(x)[:2] != result[:2] for x in operands):
        return unknown(node, "broadcast heads in ")
    # No letter for tokens: a causal attention knows their order.
    members: list[tuple[Argument, Letters]] = [
        *((x, ("b", "h", None, "e")) for x in (q, k)),
        *((x, ("b", "h", None, "d")) for x in (v, node)),
    ]
    if isinstance(mask, fx.Node):
        axes = aligned(mask, (*result[:3], shape_of(operands[1])[2]))
        names: dict[int | str | None, str] = {0: "b", 1: "h"}
        members.append((mask, tuple(names.get(axis) for axis in axes)))
    return tie(*members)


def _batch_norm(node: fx.Node) -> Relations:
    x, *per_channel = arguments(node)[:5]
    letters: Letters = ("n", "c", *range(len(shape_of(node)) - 2))
    return tie((x, letters), *((each, ("c",)) for each in per_channel), (node, letters))


def _normalised(node: fx.Node) -> Relations:
    """layer_norm, rms_norm: over the last axis they do not care for the order."""
    x, sizes, *per_channel = arguments(node)[:4]
    if not isinstance(sizes, list | tuple) or len(sizes) != 1:
        return unknown(node)
    letters = (*_batch(node, 1), "c")
    return tie((x, letters), *((each, ("c",)) for each in per_channel), (node, letters))


def _mean(node: fx.Node) -> Relations:
    x, dims, keepdim = arguments(node)[:3]
    if not isinstance(x, fx.Node) or not isinstance(dims, list | tuple):
        return unknown(node)
    every = range(len(shape_of(x)))
    gone = {dim % len(every) for dim in dims if isinstance(dim, int)}
    left = tuple(
        axis if axis not in gone else None for axis in every if keepdim or axis not in gone
    )
    return tie((x, tuple(every)), (node, left))


def _images(axes: int) -> Callable[[fx.Node], Relations]:
    """Each channel's image, of so many axes, is treated alike and by itself."""

    def read(node: fx.Node) -> Relations:
        letters: Letters = (*_batch(node, axes), *(None,) * axes)
        return tie((node.args[0], letters), (node, letters))

    return read


def _padding(node: fx.Node) -> Relations:
    """Axes that are padded, or cut by a negative number, keep no order."""
    pads = arguments(node)[1]
    if not isinstance(pads, list | tuple):
        return unknown(node)
    rank = len(shape_of(node))
    padded = {rank - 1 - place // 2 for place, pad in enumerate(pads) if pad != 0}
    letters = tuple(None if axis in padded else axis for axis in range(rank))
    return tie((node.args[0], letters), (node, letters))


_PRODUCTS: dict[OpOverload, Callable[[fx.Node], Relations]] = {
    aten.linear.default: _linear,
    aten.addmm.default: _addmm,
    aten.matmul.default: _matmul,
    aten.mm.default: _matmul,
    aten.bmm.default: _matmul,
}
TIES: dict[OpOverload, Callable[[fx.Node], Relations]] = {
    **_PRODUCTS,
    **{conv: _convolution for conv in CONVOLUTIONS if isinstance(conv, OpOverload)},
    ATTENTION: _attention,
    aten.contiguous.default: _same,
    aten.clone.default: _same,
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.to.dtype: _same,
    aten.to.dtype_layout: _same,
    aten.to.device: _same,
    aten._to_copy.default: _same,
    aten.hardswish.default: _same,  # pointwise, though not tagged so
    aten.hardswish_.default: _same,
    aten.softmax.int: _same,  # whatever its axis: a sum does not care for the order
    aten.dropout.default: _dropout,
    aten.dropout_.default: _dropout,
    aten.feature_dropout.default: _dropout,
    aten.batch_norm.default: _batch_norm,
    aten.layer_norm.default: _normalised,
    aten.rms_norm.default: _normalised,
    aten.mean.dim: _mean,
    aten.sum.dim_IntList: _mean,
    aten.pad.default: _padding,
    aten.constant_pad_nd.default: _padding,
    aten.adaptive_avg_pool1d.default: _images(1),
    aten.adaptive_avg_pool2d.default: _images(2),
    aten.avg_pool1d.default: _images(1),
    aten.avg_pool2d.default: _images(2),
    aten.max_pool1d.default: _images(1),
    aten.max_pool2d.default: _images(2),
    aten.upsample_nearest2d.vec: _images(2),
    aten.upsample_bilinear2d.vec: _images(2),
    aten.upsample_bicubic2d.vec: _images(2),
}
"""How each of these operators is read; any other that torch tags as pointwise: `pointwise`."""
