"""Whether an attention's keys come from another place than its queries: cross-attention."""

import operator
from collections.abc import Iterator

import torch
from torch import fx, nn
from torch._ops import OpOverload

from sparsefx.candidates import CONVOLUTIONS
from sparsefx.mutation import mutates
from sparsefx.ops import MASKED_OPS, PACKED_OPS
from sparsefx.rewrite import arguments
from sparsefx.shapes import hint

aten = torch.ops.aten

_MATRIX_PRODUCTS = frozenset({aten.matmul.default, aten.mm.default})
_PROJECTIONS = frozenset({aten.linear.default, *PACKED_OPS, *CONVOLUTIONS})
_VIEWS = frozenset({"narrow", "select", "transpose", "view"})
_DEPTH = 6  # of expressions that are compared: views and sums before a projection


def cross_attention(node: fx.Node, q: fx.Node, k: fx.Node) -> str | None:
    """Why the keys of the attention `node` are not those of its own queries' sequence, or None.

    Walks back from q and k, through rope, norms, reshapes and caches (also those written in place),
    to the nearest projections (linears, convolutions, products with a weight) and compares what
    these act on. Self-attention has one in common. Keys of no projection at all, while the queries
    have one, are those of an encoder, cached by an earlier call. Where neither has one, q and k are
    the inputs of something like a function: that is self-attention, unless there are fewer keys
    than queries, which no cache of the queries' own sequence has.
    """
    queries, keys = _projected(q, node), _projected(k, node)
    if not queries and not keys:
        shorter = hint(k.meta["val"].shape[-2]) < hint(q.meta["val"].shape[-2])
        return "cross-attention: it has fewer keys than queries" if shorter else None
    if not keys and not _any_alike(queries, _leaves(k, node)):
        return "cross-attention: its keys come from no projection of the layer's input"
    sources = queries or _leaves(q, node)
    if not _any_alike(sources, keys or _leaves(k, node)):
        return "cross-attention: its keys come from another source than its queries"
    return None


def _projected(start: fx.Node, until: fx.Node) -> list[fx.Node]:
    """What the nearest projections behind `start` act on."""
    found = (_projection_input(node) for node in _walk(start, until))
    return [x for x in found if x is not None]


def _leaves(start: fx.Node, until: fx.Node) -> list[fx.Node]:
    """The inputs of the graph behind `start` that no projection stands before."""
    return [node for node in _walk(start, until) if node.op == "placeholder"]


def _walk(start: fx.Node, until: fx.Node) -> list[fx.Node]:
    """All nodes behind `start` up to the nearest projections, and what writes to them in place."""
    order = {node: place for place, node in enumerate(until.graph.nodes)}
    seen: dict[fx.Node, None] = {start: None}
    waiting = [start]
    while waiting:
        node = waiting.pop()
        if _projection_input(node) is not None:
            continue
        writers = (user for user in _writers(node) if order[user] < order[until])
        for other in (*node.all_input_nodes, *(x for w in writers for x in w.all_input_nodes)):
            if other not in seen:
                seen[other] = None
                waiting.append(other)
    return list(seen)


def _writers(node: fx.Node) -> Iterator[fx.Node]:
    """The nodes that may write to a tensor, or to a view of it."""
    for user in node.users:
        if mutates(user):
            yield user
        elif _is_view(user):
            yield from _writers(user)


def _is_view(node: fx.Node) -> bool:
    if isinstance(node.target, OpOverload):
        return any(result.alias_info is not None for result in node.target._schema.returns)
    return node.target is operator.getitem or (node.op == "call_method" and node.target in _VIEWS)


def _projection_input(node: fx.Node) -> fx.Node | None:
    """x of a projection x W^T, else None."""
    if node.target in _PROJECTIONS:
        x = node.args[0] if node.args else None
    elif node.target is aten.addmm.default:
        x = arguments(node)[1]
    elif node.target in _MATRIX_PRODUCTS and _is_weight(arguments(node)[1]):
        x = arguments(node)[0]
    else:
        return None
    return x if isinstance(x, fx.Node) else None


def _is_weight(value: object) -> bool:
    """A parameter, or what is made of one alone, as by a mask or a transposition."""
    while isinstance(value, fx.Node) and value.op in ("call_function", "call_method"):
        is_made_of_one = len(value.all_input_nodes) == 1 or value.target in MASKED_OPS
        value = value.all_input_nodes[0] if is_made_of_one else None
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), nn.Parameter)


def _any_alike(first: list[fx.Node], second: list[fx.Node]) -> bool:
    return any(_alike(a, b, _DEPTH) for a in first for b in second)


def _alike(a: object, b: object, depth: int) -> bool:
    """Whether two arguments are one, or the same expression written twice."""
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return type(a) is type(b) and _alike_parts(a, b, depth)
    if a is b:
        return True
    if depth == 0 or (a.op, a.target) != (b.op, b.target) or not a.all_input_nodes:
        return False
    return _alike_parts((a.args, a.kwargs), (b.args, b.kwargs), depth - 1)


def _alike_parts(a: object, b: object, depth: int) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and _alike_parts([*a.values()], [*b.values()], depth)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(_alike(x, y, depth) for x, y in zip(a, b, strict=True))
    return bool(a == b)
