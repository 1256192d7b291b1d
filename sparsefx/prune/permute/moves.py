"""Operators that put elements elsewhere, as Moves: views, transposes, parts, cat, expand."""

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from sparsefx.prune.permute.labels import NONE, compressed, reshaped
from sparsefx.prune.permute.relations import Move, Relations, shape_of, unknown
from sparsefx.rewrite import arguments

aten = torch.ops.aten

SEVERAL = frozenset(
    {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int}
)
"""Operators whose results are a list, taken apart by operator.getitem."""


def _view(node: fx.Node) -> Relations:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    before, after = shape_of(source), shape_of(node)
    return (
        Move(
            source,
            node,
            lambda labels: reshaped(labels, before, after),
            lambda labels: reshaped(labels, after, before),
        ),
    )


def _swap(node: fx.Node) -> Relations:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    order = _axes_of(node, len(shape_of(source)))
    if order is None:
        return unknown(node)
    inverse = [order.index(axis) for axis in range(len(order))]
    return (
        Move(
            source,
            node,
            lambda labels: labels.permute(order),
            lambda labels: labels.permute(inverse),
        ),
    )


def _axes_of(node: fx.Node, rank: int) -> list[int] | None:
    """Where each axis of the result comes from."""
    args, order = arguments(node)[1:], list(range(rank))
    if node.target is aten.permute.default:
        dims = args[0]
        assert isinstance(dims, list | tuple)
        return [dim % rank for dim in dims if isinstance(dim, int)]
    first, second = (args[0], args[1]) if args else (-2, -1)
    if not isinstance(first, int) or not isinstance(second, int):
        return None
    order[first % rank], order[second % rank] = second % rank, first % rank
    return order


def _part(node: fx.Node) -> Relations:
    """slice, select."""
    source, dim, *where = arguments(node)
    if not isinstance(source, fx.Node) or not isinstance(dim, int):
        return unknown(node)
    size = shape_of(source)[dim]
    if node.target is aten.select.int:
        index = where[0]
        return _taken(source, node, dim, index) if isinstance(index, int) else unknown(node)
    start, end, stride = where
    begin, stop = (0 if start is None else start), (size if end is None else end)
    if not (isinstance(begin, int) and isinstance(stop, int) and stride == 1):
        return _all_of(source, node) if shape_of(source) == shape_of(node) else unknown(node)
    begin, stop, _ = slice(begin, stop).indices(size)
    return _range(source, node, dim, begin, stop - begin)


def _all_of(source: fx.Node, node: fx.Node) -> Relations:
    return (Move(source, node, lambda labels: labels, lambda labels: labels),)


def _range(source: fx.Node, node: fx.Node, dim: int, start: int, length: int) -> Relations:
    """`length` places of the axis `dim` from `start` on."""
    size = shape_of(source)[dim]

    def forward(labels: Tensor) -> Tensor:
        return labels if labels.shape[dim] == 1 else labels.narrow(dim, start, length)

    def backward(labels: Tensor) -> Tensor:
        # Where the channel does not depend on the axis, as for some of the tokens, it is not taken
        # to depend on it in the source either: nothing could permute a part of the tokens only.
        if labels.shape[dim] == 1 and length != 1:
            return labels
        return _filled(labels, dim, start, length, size)

    return (Move(source, node, forward, backward),)


def _taken(source: fx.Node, node: fx.Node, dim: int, index: int) -> Relations:
    """One place of the axis `dim`, which the result does not have."""
    size = shape_of(source)[dim]

    def forward(labels: Tensor) -> Tensor:
        return labels.select(dim, 0 if labels.shape[dim] == 1 else index)

    def backward(labels: Tensor) -> Tensor:
        spread = labels.unsqueeze(dim % (labels.dim() + 1))
        return _filled(spread, dim, index % size, 1, size)

    return (Move(source, node, forward, backward),)


def _filled(labels: Tensor, dim: int, start: int, length: int, size: int) -> Tensor:
    shape = list(labels.shape)
    shape[dim] = size
    whole = torch.full(shape, NONE)
    whole.narrow(dim, start, length).copy_(labels)
    return compressed(whole)


def _expand(node: fx.Node) -> Relations:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    rank, shape = len(shape_of(node)), shape_of(source)

    def forward(labels: Tensor) -> Tensor:
        return labels.view((1,) * (rank - len(shape)) + tuple(labels.shape))

    def backward(labels: Tensor) -> Tensor:
        spread = [a for a in range(rank) if a < rank - len(shape) or shape[a - rank] == 1]
        for axis in spread:
            labels = labels.amax(axis, keepdim=True)  # any that is not NONE: forward joins them
        return labels.view(labels.shape[rank - len(shape) :])

    return (Move(source, node, forward, backward),)


def _repeat_interleave(node: fx.Node) -> Relations:
    source, times, dim = arguments(node)[:3]
    if not (isinstance(source, fx.Node) and isinstance(times, int) and isinstance(dim, int)):
        return unknown(node)
    dim %= len(shape_of(source))

    def forward(labels: Tensor) -> Tensor:
        return labels if labels.shape[dim] == 1 else labels.repeat_interleave(times, dim)

    def backward(labels: Tensor) -> Tensor:
        if labels.shape[dim] == 1:
            return labels
        each: Tensor = labels.unflatten(dim, (-1, times))
        return each.amax(dim + 1)  # as in _expand

    return (Move(source, node, forward, backward),)


def _cat(node: fx.Node) -> Relations:
    pieces, dim = arguments(node)[:2]
    assert isinstance(pieces, list | tuple)
    nodes = [piece for piece in pieces if isinstance(piece, fx.Node)]
    if not isinstance(dim, int) or any(len(shape_of(n)) != len(shape_of(node)) for n in nodes):
        return unknown(node)
    sizes = [shape_of(piece)[dim] for piece in nodes]
    starts = [0, *accumulate(sizes)]
    return tuple(
        _piece(piece, node, dim, start, size)
        for piece, start, size in zip(nodes, starts, sizes, strict=False)
    )


def _piece(source: fx.Node, node: fx.Node, dim: int, start: int, size: int) -> Move:
    whole = shape_of(node)[dim]

    def forward(labels: Tensor) -> Tensor:
        if labels.shape[dim] == 1 and size != 1:
            return labels
        return _filled(labels, dim, start, size, whole)

    def backward(labels: Tensor) -> Tensor:
        return labels if labels.shape[dim] == 1 else labels.narrow(dim, start, size)

    return Move(source, node, forward, backward)


def part_of_several(node: fx.Node) -> Relations:
    """getitem of the list that an operator of SEVERAL gives."""
    several, number = node.args
    assert isinstance(several, fx.Node)
    if several.target not in SEVERAL:
        return unknown(several)
    source, sizes, *rest = arguments(several)
    dim = sizes if several.target is aten.unbind.int else rest[0]
    if not (isinstance(source, fx.Node) and isinstance(number, int) and isinstance(dim, int)):
        return unknown(several)
    if several.target is aten.unbind.int:
        return _taken(source, node, dim, number)
    whole, length = shape_of(source)[dim], shape_of(node)[dim]
    if isinstance(sizes, list | tuple):
        known = [size for size in sizes[:number] if isinstance(size, int)]
        return _range(source, node, dim, sum(known), length) if number >= 0 else unknown(several)
    if not isinstance(sizes, int) or number < 0:
        return unknown(several)
    step = -(-whole // sizes) if several.target is aten.chunk.default else sizes
    return _range(source, node, dim, number * step, length)


MOVES: dict[OpOverload, Callable[[fx.Node], Relations]] = {
    aten.view.default: _view,
    aten.reshape.default: _view,
    aten._unsafe_view.default: _view,
    aten.flatten.using_ints: _view,
    aten.unflatten.int: _view,
    aten.unsqueeze.default: _view,
    aten.squeeze.default: _view,
    aten.squeeze.dim: _view,
    aten.squeeze.dims: _view,
    aten.transpose.int: _swap,
    aten.permute.default: _swap,
    aten.t.default: _swap,
    aten.mT.default: _swap,
    aten.slice.Tensor: _part,
    aten.select.int: _part,
    aten.expand.default: _expand,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.cat.default: _cat,
}
"""How each of these operators is read."""
