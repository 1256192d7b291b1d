"""find_order(): an order of input channels under which N:M keeps more, by swaps between groups.

The sum that N:M keeps of scores S [rows, channels] is a sum over groups of m channels:

    kept = sum over groups G and rows r of the n largest of S[r, G]

Take channel a out of its group: the n largest of the m - 1 left sum to `base[r]`, the least of them
is `floor[r]`. With channel b in the place of a the group keeps base[r] + max(0, S[r, b] - floor[r])
in row r, so all m x m swaps between two groups cost one comparison a row each, and their gains are
exact. Groups meet in the rounds of a tournament: in each every group has one partner, so all pairs
of a round are judged at once and each makes its best swap. When no pair of groups gains, a few
groups at random are shuffled and settle among themselves; that stays only if they keep more.

The objective and the idea of swaps and escapes: Pool and Yu 2021, "Channel Permutations for N:M
Sparsity".
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefx.errors import ShapeMismatch

WORK = 1_000_000_000
"""Comparisons that a search may make by default: about two seconds of one CPU thread."""
_ENOUGH = 8  # tournaments of all groups; small problems find hardly more after so many
_ESCAPE = 32  # groups that an escape shuffles
_CHUNK = 1 << 21  # elements of a batch of pairs: bounds what is allocated
_LEAST_GAIN = 1e-6  # of what two groups keep: below it a gain in float32 may be rounding


@dataclass(frozen=True)
class Found:
    """order: int64 [channels], the channel to put at each place; before, after: kept scores."""

    order: Tensor
    before: float
    after: float

    @property
    def gain(self) -> float:
        """How much more is kept, as a share of what was kept; at least 0."""
        return self.after / self.before - 1 if self.before else 0.0


def find_order(
    scores: Sequence[Tensor], n: int, m: int, *, work: int = WORK, seed: int = 0
) -> Found:
    """An order of the channels, of all score matrices at once, under which N:M keeps more.

    scores: each [rows_i, channels], at least 0, any float dtype, one device; channels a multiple of
    m. What is kept in the new order is never less than in the given one, and the same call gives
    the same order. work: the most comparisons to make, which bounds the time; small problems stop
    earlier, after the comparisons of eight tournaments. Raises ShapeMismatch.
    """
    table = _table(scores, m)
    given = torch.arange(len(table), device=table.device)
    before = kept(scores, given, n, m)
    if len(table) == m:
        return Found(given, before, before)
    start = max((given, _dealt(table, m)), key=lambda order: kept(scores, order, n, m))
    generator = torch.Generator().manual_seed(seed)
    work = min(work, _ENOUGH * len(table) * table.numel())
    order = _Search(table, start.view(-1, m).clone(), n, work).run(generator)
    after = kept(scores, order, n, m)
    return Found(order, before, after) if after > before else Found(given, before, before)


def kept(scores: Sequence[Tensor], order: Tensor, n: int, m: int) -> float:
    """The sum of what N:M keeps of `scores` with the channels in `order`, in float64."""
    total = 0.0
    for matrix in scores:
        groups = matrix[:, order].view(matrix.shape[0], -1, m)
        total += groups.topk(n, dim=-1).values.sum(dtype=torch.float64).item()
    return total


def _table(scores: Sequence[Tensor], m: int) -> Tensor:
    """The matrices one above the other, transposed: float32 [channels, rows]."""
    channels = scores[0].shape[-1] if scores else 0
    for number, matrix in enumerate(scores):
        if matrix.dim() != 2 or matrix.shape[1] != channels or channels % m:
            raise ShapeMismatch(
                name=f"score matrix {number}",
                shape=tuple(matrix.shape),
                rule=f"it must be [rows, {channels}], and {m} must divide its channels",
                remedy="Pass matrices that share one order of channels",
            )
    if not channels:
        raise ShapeMismatch(
            name="scores",
            shape=(len(scores), 0),
            rule="there is nothing to order",
            remedy="Pass at least one matrix",
        )
    return torch.cat([matrix.float() for matrix in scores]).T.contiguous()


def _dealt(table: Tensor, m: int) -> Tensor:
    """Channels by falling total score, dealt like cards: no group gets all the strong ones."""
    ranked = table.sum(1).sort(stable=True, descending=True).indices
    return ranked.view(m, -1).T.reshape(-1)


class _Search:
    """Groups of channels, swapped until the work is spent.

    table: scores [channels, rows]; groups: int64 [groups, m]; kept: [groups]; floor: [channels,
    rows] and base: [channels] as in the module's text, base less the sum of floor, because
    max(0, s - floor) = max(s, floor) - floor.
    """

    def __init__(self, table: Tensor, groups: Tensor, n: int, work: int) -> None:
        self.table, self.groups, self.n, self.work = table, groups, n, work
        self.kept = table.new_zeros(len(groups))
        self.floor, self.base = torch.empty_like(table), table.new_empty(len(table))
        self._refresh(torch.arange(len(groups), device=groups.device))

    def run(self, generator: torch.Generator) -> Tensor:
        """The order found, int64 [channels]."""
        self._settle(torch.arange(len(self.groups), device=self.groups.device))
        while self.work > 0:
            chosen = torch.randperm(len(self.groups), generator=generator)[:_ESCAPE]
            self._escape(chosen.to(self.groups.device), generator)
        return self.groups.flatten()

    def _settle(self, chosen: Tensor) -> None:
        """Swaps between pairs of the `chosen` groups until no pair gains."""
        while self.work > 0:
            swaps = 0
            for left, right in _rounds(len(chosen)):
                swaps += self._meet(chosen[left], chosen[right])
                if self.work <= 0:
                    return
            if not swaps:
                return

    def _escape(self, chosen: Tensor, generator: torch.Generator) -> None:
        held, kept = self.groups[chosen], self.kept[chosen].sum()
        shuffle = torch.randperm(held.numel(), generator=generator).to(held.device)
        self.groups[chosen] = held.flatten()[shuffle].view_as(held)
        self._refresh(chosen)
        self._settle(chosen)
        if self.kept[chosen].sum() <= kept:
            self.groups[chosen] = held
            self._refresh(chosen)

    def _meet(self, left: Tensor, right: Tensor) -> int:
        """Makes the best swap of each pair (left[i], right[i]) that gains; returns how many."""
        m, rows = self.groups.shape[1], self.table.shape[1]
        size = max(1, _CHUNK // (m * m * rows))
        parts = zip(left.split(size), right.split(size), strict=True)
        swapped = [self._swap(some, others) for some, others in parts]
        self._refresh(torch.cat(swapped))
        self.work -= 2 * len(left) * m * m * rows
        return sum(map(len, swapped)) // 2

    def _swap(self, left: Tensor, right: Tensor) -> Tensor:
        """Swaps and returns the groups that did, which `_refresh` must see."""
        m, now = self.groups.shape[1], self.kept[left] + self.kept[right]
        then = self._taking(left, right) + self._taking(right, left).mT
        best, place = (then - now[:, None, None]).flatten(1).max(1)
        gains = (best > _LEAST_GAIN * now).nonzero().flatten()
        some, others = left[gains], right[gains]
        out, into = place[gains] // m, place[gains] % m
        leaving, coming = self.groups[some, out], self.groups[others, into]
        self.groups[some, out], self.groups[others, into] = coming, leaving
        return torch.cat([some, others])

    def _taking(self, group: Tensor, others: Tensor) -> Tensor:
        """[pairs, m, m]: what a group keeps with its channel i replaced by channel j of another."""
        own, coming = self.groups[group], self.groups[others]
        higher = torch.maximum(self.floor[own][:, :, None], self.table[coming][:, None])
        return higher.sum(-1) + self.base[own][..., None]

    def _refresh(self, changed: Tensor) -> None:
        """Brings kept, floor and base of the `changed` groups up to date."""
        size = max(1, _CHUNK // (self.groups.shape[1] * self.table.shape[1]))
        for some in changed.split(size):
            values = self.table[self.groups[some]]
            self.work -= values.numel()
            top = _largest(values, self.n + 1)
            least, next_one = top[self.n - 1][:, None], top[self.n][:, None]
            inside = values >= least  # where one of the n largest leaves, the next one moves up
            floor = torch.where(inside, next_one, least)
            lost = torch.where(inside, values - next_one, 0).sum(-1)
            self.kept[some] = torch.stack(top[: self.n]).sum((0, 2))
            self.floor[self.groups[some]] = floor
            self.base[self.groups[some]] = self.kept[some][:, None] - lost - floor.sum(-1)


def _largest(values: Tensor, count: int) -> list[Tensor]:
    """The `count` largest along axis 1, falling; for a few among few, much faster than a sort."""
    rest = list(values.unbind(1))
    for place in range(count):
        for other in range(place + 1, len(rest)):
            high, low = rest[place], rest[other]
            rest[place], rest[other] = torch.maximum(high, low), torch.minimum(high, low)
    return rest[:count]


def _rounds(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The rounds of a tournament: in each everyone has one partner, after all each pair has met.

    The circle method: one stays, the others move round it; of an odd count one pauses.
    """
    even = count + count % 2
    for turn in range(even - 1):
        ring = (torch.arange(even - 1) + turn) % (even - 1) + 1
        circle = torch.cat([torch.zeros(1, dtype=torch.int64), ring])
        left, right = circle[: even // 2], circle[even // 2 :].flip(0)
        present = (left < count) & (right < count)
        yield left[present], right[present]
