"""Everything in some graphs whose channels move when those of one weight's input do.

The labels of one tensor are carried through every operator that reads or makes it, to tensors that
are new, until nothing is new. Two labels that meet at one element become one label; labels that
reach an operator of which nothing is known are pinned: they stay where they are. What is left may
be permuted, within *blocks* of labels that no operator tells apart.
"""

import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from sparsefx.prune.permute.blocks import Blocks
from sparsefx.prune.permute.labels import NONE, Classes, compressed, ranks, varying
from sparsefx.prune.permute.moves import MOVES, SEVERAL, part_of_several
from sparsefx.prune.permute.relations import (
    Letters,
    Move,
    Relations,
    Tie,
    holds_tensor,
    unknown,
)
from sparsefx.prune.permute.ties import TIES, pointwise
from sparsefx.rewrite import Decline, tensor_of

aten = torch.ops.aten
_READS_NO_ELEMENT = frozenset({aten._assert_tensor_metadata.default, aten.sym_size.int})


class Wiring:
    """The relations of every operator of some graphs of one model, read once.

    known: names of the model's tensors. A parameter or buffer that is read under several names, or
    by several graphs, is one tensor here, so that what one graph says of it holds in all.
    """

    def __init__(self, graphs: Sequence[fx.GraphModule], known: frozenset[str]) -> None:
        self.known = known
        self._read: dict[fx.Node, Relations] = {}
        self._tensors: dict[int, list[fx.Node]] = defaultdict(list)
        for node in weight_nodes(graphs):
            if holds_tensor(node):
                self._tensors[id(tensor_of(node))].append(node)
        self._overlapping = _overlapping([tensor_of(nodes[0]) for nodes in self._tensors.values()])

    def of(self, node: fx.Node) -> Iterator[Relations]:
        """What makes the tensor `node` and what reads it say about it."""
        if node.op == "get_attr":
            yield self._weight(node)
        else:
            yield self._relations(node)
        for user in node.users:
            if user.target in SEVERAL:
                yield from (self._relations(part) for part in user.users)
            elif user.target not in _READS_NO_ELEMENT:
                yield self._relations(user)

    def _weight(self, node: fx.Node) -> Relations:
        tensor = tensor_of(node)
        if node.target not in self.known:
            return Decline(f"its channels meet the constant {node.target}")
        if id(tensor) in self._overlapping:
            return Decline(f"{node.target} shares memory with another weight")
        letters: Letters = tuple(range(tensor.dim()))
        same = self._tensors[id(tensor)]
        # Each with the first, not with all: one of many graphs has as many.
        tied = same if node is same[0] else [same[0], node]
        return (Tie(tuple((each, letters) for each in tied)),)

    def _relations(self, node: fx.Node) -> Relations:
        if node not in self._read:
            self._read[node] = _relations(node)
        return self._read[node]


def weight_nodes(graphs: Sequence[fx.GraphModule]) -> list[fx.Node]:
    """What reads parameters, buffers and constants, graph by graph."""
    return [node for gm in graphs for node in gm.graph.find_nodes(op="get_attr")]


def _overlapping(tensors: list[Tensor]) -> set[int]:
    """The identities of those that have memory in common with another, as far as can be told."""
    spans = []
    for tensor in tensors:
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        if tensor.numel():
            start = tensor.data_ptr()
            spans.append((start, start + (last + 1) * tensor.element_size(), id(tensor)))
    found: set[int] = set()
    furthest = (0, 0)  # the end that reaches furthest so far, and whose it is
    for start, end, identity in sorted(spans):
        if start < furthest[0]:
            found |= {identity, furthest[1]}
        furthest = max(furthest, (end, identity))
    return found


def _relations(node: fx.Node) -> Relations:
    if node.op != "call_function":
        what = {"placeholder": "an input", "output": "an output"}.get(node.op, "elsewhere")
        return Decline(f"its channels are those of {what} of the model")
    if node.target is operator.getitem:
        return part_of_several(node)
    if not isinstance(node.target, OpOverload) or not holds_tensor(node):
        return unknown(node)
    if node.target in MOVES:
        return MOVES[node.target](node)
    if node.target in TIES:
        return TIES[node.target](node)
    tags = node.target.tags
    if torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags:
        return pointwise(node)
    return unknown(node)


class Component:
    """The labels of all tensors tied to the axis `axis` of the weight `seed`."""

    def __init__(self, wiring: Wiring, seed: fx.Node, axis: int) -> None:
        self._wiring = wiring
        shape = [1] * tensor_of(seed).dim()
        shape[axis] = tensor_of(seed).shape[axis]
        self.count = shape[axis]
        self.reason = "its channels are tied to one another"
        self._classes = Classes(self.count)
        self._pinned = torch.zeros(self.count, dtype=torch.bool)
        self._labels: dict[fx.Node, Tensor] = {}
        self._queue: list[fx.Node] = []
        self._visit(seed, torch.arange(self.count).view(shape))
        while self._queue and not bool(self._pinned.all()):
            self._follow(self._queue.pop())

    def weights(self) -> dict[fx.Node, Tensor]:
        """The parameters and buffers reached, each with its labels; one node for each name."""
        roots = self._classes.roots()
        return {n: roots[held] for n, held in self._labels.items() if n.op == "get_attr"}

    def blocks(self) -> Tensor:
        """int64 [count]: the block of each label, in which it may change places; -1: it may not.

        A label that was joined to a lesser one is -1 too.
        """
        blocks = Blocks(self.count)
        if bool(self._pinned.all()):
            return blocks.numbered()
        roots = self._classes.roots()
        final = {node: roots[held] for node, held in self._labels.items()}
        copies = {node: ranks(held) for node, held in final.items()}
        for node, held in final.items():
            blocks.tell_apart(held, copies[node], torch.zeros_like(held))
            for relation in self._found(node):
                if isinstance(relation, Move):
                    _check_move(blocks, relation, final, copies)
                else:
                    _check_tie(blocks, node, relation, final, copies)
        blocks.pin(roots[self._pinned.nonzero().flatten()])
        return blocks.numbered()

    def _found(self, node: fx.Node) -> Iterator[Tie | Move]:
        for relations in self._wiring.of(node):
            if not isinstance(relations, Decline):
                yield from relations

    def _follow(self, node: fx.Node) -> None:
        for relations in self._wiring.of(node):
            if isinstance(relations, Decline):
                self._pin(self._labels[node], relations.reason)
                return
        if node.op == "get_attr" and len(varying(self._labels[node])) > 1:
            self._pin(self._labels[node], f"its channels run over two axes of {node.target}")
        for relation in self._found(node):
            if isinstance(relation, Move):
                self._carry(node, relation)
            else:
                self._spread(node, relation)

    def _carry(self, node: fx.Node, move: Move) -> None:
        if move.source is node:
            self._visit(move.target, move.forward(self._labels[node]))
        if move.target is node:
            self._visit(move.source, move.backward(self._labels[node]))

    def _spread(self, node: fx.Node, tie: Tie) -> None:
        for letters in (own for member, own in tie.members if member is node):
            labels = self._labels[node]
            if None in _over(labels, letters):
                self._pin(labels, f"its channels run along another axis in {node.name}")
                return
            for other, theirs in tie.members:
                laid = _laid(labels, letters, theirs)
                if laid is not None:
                    self._visit(other, laid)

    def _visit(self, node: fx.Node, labels: Tensor) -> None:
        labels = compressed(labels)
        old = self._labels.get(node)
        if old is None:
            if bool((labels != NONE).any()):
                self._labels[node] = labels
                self._queue.append(node)
            return
        size = torch.broadcast_shapes(old.shape, labels.shape)
        if torch.Size(size).numel() > max(old.numel(), labels.numel()):
            self._pin(old, f"its channels run over two axes of {node.name}")
            self._pin(labels, self.reason)
            return
        self._classes.join(old, labels)
        merged = compressed(torch.where(old == NONE, labels, old))
        if bool(((old == NONE) & (labels != NONE)).any()):
            self._labels[node] = merged
            self._queue.append(node)

    def _pin(self, labels: Tensor, reason: str) -> None:
        if not bool(self._pinned.any()):
            self.reason = reason
        self._pinned[labels[labels != NONE]] = True


def _over(labels: Tensor, letters: Letters) -> list[int | str | None]:
    """The letters along which the channel changes, in the order of the axes."""
    return [letters[axis] for axis in varying(labels)]


def _laid(labels: Tensor, letters: Letters, theirs: Letters) -> Tensor | None:
    """The same labels for a member with the letters `theirs`; None unless it has all of them."""
    over = _over(labels, letters)
    if not over or not set(over) <= set(theirs):
        return None
    order = [over.index(letter) for letter in theirs if letter in over]
    flat = labels.squeeze().permute(order)
    sizes = iter(flat.shape)
    return flat.reshape([next(sizes) if letter in over else 1 for letter in theirs])


def _check_move(
    blocks: Blocks, move: Move, final: dict[fx.Node, Tensor], copies: dict[fx.Node, Tensor]
) -> None:
    """Two labels may change places if the copies of both lie alike on both sides."""
    if move.source not in final or move.target not in final:
        return
    moved, ranked = (move.forward(each[move.source]) for each in (final, copies))
    there, rank = torch.broadcast_tensors(final[move.target], copies[move.target])
    moved, ranked, there, rank = torch.broadcast_tensors(moved, ranked, there, rank)
    both = (moved != NONE) & (there != NONE)
    blocks.pin(torch.cat([each[both & (moved != there)] for each in (moved, there)]))
    blocks.tell_apart(there[both], ranked[both], rank[both])


def _check_tie(
    blocks: Blocks,
    node: fx.Node,
    tie: Tie,
    final: dict[fx.Node, Tensor],
    copies: dict[fx.Node, Tensor],
) -> None:
    """The same for members that have all letters; of one that has some, no index may change."""
    for letters in (own for member, own in tie.members if member is node):
        over = _over(final[node], letters)
        for other, theirs in tie.members:
            laid = _laid(final[node], letters, theirs)
            if laid is not None and other in final:
                rank = _laid(copies[node], letters, theirs)
                assert rank is not None
                parts = torch.broadcast_tensors(laid, final[other], rank, copies[other])
                mine, there, rank, theirs_rank = parts
                both = (mine != NONE) & (there != NONE)
                blocks.pin(torch.cat([each[both & (mine != there)] for each in (mine, there)]))
                blocks.tell_apart(mine[both], rank[both], theirs_rank[both])
            elif laid is None and (some := set(over) & set(theirs)):
                index = _index(final[node], [letter in some for letter in letters])
                blocks.tell_apart(final[node], copies[node], index)


def _index(labels: Tensor, axes: list[bool]) -> Tensor:
    """The place of each element along the varying axes chosen, counted as one number."""
    index = torch.zeros_like(labels)
    for axis in varying(labels):
        if axes[axis]:
            shape = [1] * labels.dim()
            shape[axis] = labels.shape[axis]
            index = index * labels.shape[axis] + torch.arange(labels.shape[axis]).view(shape)
    return index
