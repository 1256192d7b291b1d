"""Reads a hand-written attention around its softmax: product, scale, masks before, product after.

What is read is a plain description; `fuse_attention` builds from it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import fx

from sparsefx.passes.attention_spelling import argument, cast_of, is_tensor, number, source, step
from sparsefx.rewrite import Decline
from sparsefx.shapes import same

aten = torch.ops.aten

HIDES = -1e4
"""A finite score from here down has no weight beside any score that is not hidden."""
_STEPS = 16  # between the product of queries and keys and the softmax
_NO_EFFECT = frozenset({aten._assert_tensor_metadata.default})


@dataclass(frozen=True)
class Term:
    """One mask. kind: "add" (times `factor`), or "keep" / "drop": the others become `fill`."""

    kind: str
    mask: fx.Node
    factor: float = 1.0
    fill: float = 0.0


@dataclass(frozen=True)
class Scores:
    """factor * (Q K^T), then `terms` in order, then the softmax.

    left, right: the operands of the product, [batch, heads, queries, dim] and [batch, heads, dim,
    keys]; scale: a number; tensors: (t, whether it divides), each constant along the keys; nodes:
    every node from the product to the softmax's input.
    """

    left: fx.Node
    right: fx.Node
    scale: float = 1.0
    tensors: tuple[tuple[fx.Node, bool], ...] = ()
    terms: tuple[Term, ...] = ()
    nodes: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Weights:
    """The product softmax(...) V. root: that product; value: V; nodes: all up to and with it."""

    root: fx.Node
    value: fx.Node
    nodes: tuple[fx.Node, ...]


def read_scores(node: fx.Node, steps: int = _STEPS) -> Scores | Decline:
    """What the softmax's input `node` is made of."""
    found = _read(node, steps) if steps else _unknown(node)
    return found if isinstance(found, Decline) else replace(found, nodes=(*found.nodes, node))


def _read(node: fx.Node, steps: int) -> Scores | Decline:
    x, name = source(node), step(node)
    if name in ("matmul", "bmm", "baddbmm", "einsum"):
        return _product(node, name)
    if x is not None and cast_of(node) is not None:
        return read_scores(x, steps - 1)
    if x is not None and name == "masked_fill":
        condition, fill = argument(node, 1, "mask"), number(argument(node, 2, "value"))
        return _filled(read_scores(x, steps - 1), "drop", condition, fill)
    if name == "where":
        return _where(node, steps)
    if name in ("add", "sub", "mul", "div"):
        return _arithmetic(node, name, steps)
    return _unknown(node)


def _unknown(node: fx.Node) -> Decline:
    return Decline(f"attention: its scores go through {step(node) or node.name}")


def _product(node: fx.Node, name: str) -> Scores | Decline:
    left, right = argument(node, 0, "input", "self"), argument(node, 1, "mat2", "other", "tensor2")
    if name != "matmul" or not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return Decline(f"attention: {name} of q and k, which are not [batch, heads, length, dim]")
    if any(not is_tensor(each) or each.meta["val"].dim() != 4 for each in (left, right)):
        return Decline("attention: q, k and v are not [batch, heads, length, dim]")
    return Scores(left, right)


def _where(node: fx.Node, steps: int) -> Scores | Decline:
    condition, chosen, other = (
        argument(node, place, name) for place, name in enumerate(("condition", "input", "other"))
    )
    if is_tensor(chosen) and number(other) is not None:
        assert isinstance(chosen, fx.Node)
        return _filled(read_scores(chosen, steps - 1), "keep", condition, number(other))
    if is_tensor(other) and number(chosen) is not None:
        assert isinstance(other, fx.Node)
        return _filled(read_scores(other, steps - 1), "drop", condition, number(chosen))
    return Decline("attention: its scores are chosen by a mask among others")


def _filled(
    scores: Scores | Decline, kind: str, condition: object, fill: float | None
) -> Scores | Decline:
    if isinstance(scores, Decline):
        return scores
    if not isinstance(condition, fx.Node) or condition.meta["val"].dtype != torch.bool:
        return Decline("attention: its mask is not boolean")
    if fill is None or not fill <= HIDES:
        return Decline(f"attention: masked scores become {fill}, which does not hide them")
    return replace(scores, terms=(*scores.terms, Term(kind, condition, fill=fill)))


def _arithmetic(node: fx.Node, name: str, steps: int) -> Scores | Decline:
    left, right = argument(node, 0, "input", "self"), argument(node, 1, "other")
    if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode") is not None:
        return Decline(f"attention: its scores go through {name} with a factor or rounding")
    commutes = name in ("add", "mul")
    first: Scores | Decline | None = None
    for scores, other in ((left, right), (right, left))[: 2 if commutes else 1]:
        if not isinstance(scores, fx.Node) or not is_tensor(scores):
            continue
        read = read_scores(scores, steps - 1)
        if isinstance(read, Scores):
            combine = _scaled if name in ("mul", "div") else _masked
            return combine(read, other, name)
        first = first or read
    return first or _unknown(node)


def _scaled(scores: Scores, other: object, name: str) -> Scores | Decline:
    value = number(other)
    if value is not None and value > 0:
        value = value if name == "mul" else 1 / value
        terms = [replace(t, factor=t.factor * value, fill=t.fill * value) for t in scores.terms]
        if any(term.fill > HIDES for term in terms if term.kind != "add"):
            return Decline("attention: masked scores are scaled to where they do not hide")
        return replace(scores, scale=scores.scale * value, terms=tuple(terms))
    if isinstance(other, fx.Node) and isinstance(other.meta.get("val"), torch.SymFloat):
        return Decline("attention: its scale is computed from a size that varies")
    if not isinstance(other, fx.Node) or not is_tensor(other) or scores.terms:
        return Decline("attention: its scores are multiplied by what is no scale")
    shape = other.meta["val"].shape
    if shape and not same(shape[-1], 1):
        return Decline("attention: its scores are multiplied by a tensor that varies over keys")
    return replace(scores, tensors=(*scores.tensors, (other, name == "div")))


def _masked(scores: Scores, other: object, name: str) -> Scores | Decline:
    if not isinstance(other, fx.Node) or not is_tensor(other) or not other.meta["val"].dim():
        return Decline("attention: a number is added to its scores")
    if not other.meta["val"].dtype.is_floating_point:
        return Decline("attention: its added mask is not of floating-point numbers")
    term = Term("add", other, factor=1.0 if name == "add" else -1.0)
    return replace(scores, terms=(*scores.terms, term))


def read_weights(softmax: fx.Node) -> Weights | Decline:
    """What becomes of the softmax: casts and an inactive dropout, then the product with V."""
    node, nodes = softmax, [softmax]
    while True:
        readers = users_of(node)
        if len(readers) != 1:
            return Decline("attention: its weights are returned, or used by something else too")
        user, name = readers[0], step(readers[0])
        if name == "matmul":
            return _weighted(user, node, nodes)
        if name in ("dropout", "feature_dropout") and is_training(user):
            return Decline("attention: dropout is on, as in training")
        if user.op == "output":
            return Decline("attention: its weights are returned")
        if name == "mul":
            return Decline("attention: its weights are multiplied by something, as by a head mask")
        if name != "dropout" and cast_of(user) is None:
            return Decline(f"attention: its weights go through {name or user.name}")
        node, nodes = user, [*nodes, user]


def _weighted(user: fx.Node, weights: fx.Node, nodes: Iterable[fx.Node]) -> Weights | Decline:
    left, right = argument(user, 0, "input", "self"), argument(user, 1, "other", "tensor2")
    if left is not weights or not isinstance(right, fx.Node) or right is weights:
        return Decline("attention: its weights are the right operand of their product")
    if not is_tensor(right) or right.meta["val"].dim() != 4:
        return Decline("attention: q, k and v are not [batch, heads, length, dim]")
    return Weights(user, right, (*nodes, user))


def users_of(node: fx.Node) -> list[fx.Node]:
    """The users of a node that do something with it; torch.export adds checks of its dtype."""
    return [user for user in node.users if user.target not in _NO_EFFECT]


def checks_of(node: fx.Node) -> list[fx.Node]:
    """The other users: checks of what the node is, void once it is gone."""
    return [user for user in node.users if user.target in _NO_EFFECT]


def is_training(dropout: fx.Node) -> bool:
    """Whether a dropout call drops anything."""
    if argument(dropout, 1, "p", default=0.5) == 0:
        return False
    return argument(dropout, 2, "training", "train", default=True) is not False
