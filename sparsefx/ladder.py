"""Which kernel runs at which number of rows, where calls bring different numbers of them.

Offers are compared with dense on a ladder of rows: 1, 2, 4, 8, ... A range between two rungs goes
to a kernel only if that wins on both, and surely between: kernels work in tiles of rows, so that
one row more than a rung may cost as much as twice the rung. docs/guard.md has the rules.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from sparsefx.choice import Ask, Offer, Reasons
from sparsefx.errors import KernelBuildFailed
from sparsefx.guard import MARGIN, Verdict
from sparsefx.target import LinearSpec

MOST = 8192  # rows of the last rung; calls with more run what wins there
_COSTLY = "choosing by rows would cost more than it gains"
_GROWN = 1.5  # how many times slower than on the first rung dense is once its work decides
_BEHIND = 1.25  # how many times slower than the fastest an offer is not worth more timings


@dataclass(frozen=True)
class Range:
    """From `first` rows up to the next range: the offers in order, then dense.

    An offer may be for multiples of some number of rows only; other rows go to the next.
    """

    first: int
    offers: tuple[Offer, ...]

    @property
    def is_total(self) -> bool:
        """Whether no number of rows goes dense."""
        return bool(self.offers) and self.offers[-1].lowering.multiple == 1


@dataclass(frozen=True)
class Table:
    """What runs where: ascending ranges, the first from 1 row; none if every row goes dense.

    verdict: of the offer that comes closest at the rows of the example call, where one was asked.
    """

    ranges: tuple[Range, ...]
    verdict: Verdict | None

    @property
    def offers(self) -> tuple[Offer, ...]:
        """All offers that some rows run, those for few rows first."""
        return tuple(dict.fromkeys(offer for each in self.ranges for offer in each.offers))

    @property
    def only(self) -> Offer | None:
        """The one offer that all rows run, if that is so."""
        is_one = len(self.ranges) == 1 and self.ranges[0].is_total
        return self.ranges[0].offers[0] if is_one and len(self.ranges[0].offers) == 1 else None

    def text(self, otherwise: str = "dense") -> str:
        """As a person reads it; otherwise: the name of what runs where no offer does."""
        lasts = [later.first - 1 for _, later in pairwise(self.ranges)]
        return ", ".join(
            f"{_names(each, otherwise)} {_span(each.first, last)}"
            for each, last in zip(self.ranges, (*lasts, None), strict=True)
        )


ALL_DENSE = Table((Range(1, ()),), None)


def rungs(least: int, most: int, example: int) -> tuple[int, ...]:
    """The rows to compare at: powers of two in least..most, both ends, and the example's."""
    most = max(least, min(most, MOST))
    powers = (2**power for power in range(int(math.log2(most)) + 1))
    inside = (rows for rows in (*powers, example) if least < rows < most)
    return tuple(sorted({least, most, *inside}))


def table(
    offers: Sequence[Offer],
    spec: LinearSpec,
    ladder: Sequence[int],
    ask: Ask,
    reasons: Reasons,
    dispatch_us: float = 0.0,
) -> Table:
    """The ranges of rows and who runs them; `reasons` hears of the offers that run nowhere.

    dispatch_us: what choosing adds to each call, dense ones too. Where that is more than dense can
    bear, nothing is chosen by rows.
    """
    trials = _Trials(offers, spec, ask, reasons, dispatch_us)
    trials.climb(ladder)
    ranges = _merged([Range(first, found) for first, found in _found(trials, ladder)])
    ranges = (replace(ranges[0], first=1), *ranges[1:])  # fewer rows than the least never come
    verdict = trials.closest(spec.rows)
    used = any(each.offers for each in ranges)
    if used and not trials.bears(ranges):
        ranges = ()
    trials.explain()
    return Table(ranges if used else (), verdict)


@dataclass
class _Trials:
    """Verdicts of offers at rows, each asked once."""

    offers: Sequence[Offer]
    spec: LinearSpec
    ask: Ask
    reasons: Reasons
    dispatch_us: float
    known: dict[tuple[int, int], Verdict | None] = field(default_factory=dict)
    bad: set[int] = field(default_factory=set)
    """Offers that gave wrong numbers or failed once: they run at no number of rows."""

    def verdict(self, place: int, rows: int) -> Verdict | None:
        """None where the kernel does not take so many rows, or fails."""
        if (place, rows) not in self.known:
            found = self.known[place, rows] = self._asked(place, rows)
            if found is not None and found.fault:
                self.bad.add(place)
        return self.known[place, rows]

    def _asked(self, place: int, rows: int) -> Verdict | None:
        offer = self.offers[place]
        refusal = offer.kernel.accepts(replace(self.spec, rows=rows))
        if refusal or rows % offer.lowering.multiple:
            return None
        try:
            return self.ask(replace(self.spec, rows=rows, rows_vary=False), offer.lowering)
        except (KernelBuildFailed, OSError) as error:
            self.reasons.add(offer.kernel, str(error))
            self.bad.add(place)
            return None

    def ratio(self, place: int, rows: int) -> float:
        """Sparse over dense with the cost of choosing; infinite where it must not run."""
        found = self.verdict(place, rows)
        if found is None or place in self.bad:
            return math.inf
        return (found.sparse_us + self.dispatch_us) / found.dense_us

    def wins(self, place: int, rows: int) -> bool:
        """Whether an offer beats dense there."""
        found = self.verdict(place, rows)
        return found is not None and max(found.bound or 0.0, self.ratio(place, rows)) < MARGIN

    def climb(self, ladder: Sequence[int]) -> None:
        """Asks all offers at each rung, and lets go of those that are left behind."""
        places = list(range(len(self.offers)))
        for before, rows in zip((0, *ladder), ladder, strict=False):
            for place in places:
                self.verdict(place, rows)
            # As long as the weight decides the time of dense, rows say little of more rows.
            if before and self._has_grown(ladder[0], rows):
                lost = {p for p in places if self._has_lost(p, before, rows)}
                lost |= {p for p in places if self._is_behind(p, before, rows)}
                places = [place for place in places if place not in lost]
            places = [place for place in places if place not in self.bad]

    def _has_grown(self, first: int, rows: int) -> bool:
        dense = {at: found.dense_us for (_, at), found in self.known.items() if found}
        return rows in dense and dense[rows] > _GROWN * dense.get(first, 0.0)

    def _has_lost(self, place: int, before: int, rows: int) -> bool:
        """Whether it lost on two rungs in a row, the second by more."""
        lost = not self.wins(place, before) and not self.wins(place, rows)
        return lost and self.ratio(place, before) <= self.ratio(place, rows) < math.inf

    def _is_behind(self, place: int, before: int, rows: int) -> bool:
        """Whether another that takes its rows was much faster on two rungs, the gap not closing."""
        gaps = [self.ratio(place, at) / self._best(place, at) for at in (before, rows)]
        return _BEHIND < gaps[0] <= gaps[1] < math.inf

    def _best(self, place: int, rows: int) -> float:
        """The best ratio of the offers that take all rows that this one takes."""
        multiple = self.offers[place].lowering.multiple
        others = (
            self.ratio(other, rows)
            for other, at in self.known
            if at == rows and multiple % self.offers[other].lowering.multiple == 0
        )
        return min(others)

    def winners(self, *rows: int) -> list[int]:
        """The offers that win at all those rows, the fastest first."""
        asked = [
            p for p in range(len(self.offers)) if all((p, each) in self.known for each in rows)
        ]
        both = [place for place in asked if all(self.wins(place, each) for each in rows)]
        return sorted(both, key=lambda place: math.prod(self.ratio(place, each) for each in rows))

    def win_between(self, place: int, low: int, high: int) -> bool:
        """Whether an offer that wins at both ends wins between: by the ends' times, or asked."""
        first, last = self.verdict(place, low), self.verdict(place, high)
        assert first is not None and last is not None  # it wins at both
        if last.sparse_us + self.dispatch_us < MARGIN * first.dense_us:
            return True
        step = self.offers[place].lowering.multiple
        return low + step >= high or self.wins(place, low + step)

    def closest(self, rows: int) -> Verdict | None:
        """The verdict of the best offer at the example's rows; of any where none got that far."""
        asked = [place for place, at in self.known if at == rows]
        found = [self.verdict(place, rows) for place in asked or range(len(self.offers))[:1]]
        there = [each for each in found if each is not None]
        return min(there, key=lambda each: (bool(each.fault), each.ratio), default=None)

    def bears(self, ranges: Sequence[Range]) -> bool:
        """Whether dense, where it runs, is slow enough to hide the cost of choosing."""
        dense = {rows: found.dense_us for (_, rows), found in self.known.items() if found}
        for each in ranges:
            before = [rows for rows in dense if rows <= each.first]
            least = dense[max(before, default=min(dense))]
            if not each.is_total and self.dispatch_us > (1 / MARGIN - 1) * least:
                return False
        return True

    def explain(self) -> None:
        """Tells of each offer why it does not run: read where none does."""
        for (place, _), found in self.known.items():
            if found:
                self.reasons.add(self.offers[place].kernel, found.reason or _COSTLY, found.ratio)


def _found(trials: _Trials, ladder: Sequence[int]) -> Iterator[tuple[int, tuple[Offer, ...]]]:
    """Where each range begins and its offers: each rung, and what lies between it and the next."""
    for low, high in zip(ladder, (*ladder[1:], None), strict=True):
        yield low, _until_total(trials, trials.winners(low))
        if high is not None and high > low + 1:
            both = [p for p in trials.winners(low, high) if trials.win_between(p, low, high)]
            yield low + 1, _until_total(trials, both)


def _until_total(trials: _Trials, places: Sequence[int]) -> tuple[Offer, ...]:
    """The offers up to the first that takes any number of rows: those behind it never run."""
    offers: list[Offer] = []
    for place in places:
        offers.append(trials.offers[place])
        if offers[-1].lowering.multiple == 1:
            break
    return tuple(offers)


def _merged(ranges: Sequence[Range]) -> tuple[Range, ...]:
    """Neighbours that run the same as one."""
    kept = list(ranges[:1])
    kept += [later for earlier, later in pairwise(ranges) if later.offers != earlier.offers]
    return tuple(kept)


def _span(first: int, last: int | None) -> str:
    return f"{first}" if first == last else f"{first}..{last or ''}"


def _names(part: Range, otherwise: str) -> str:
    names = [
        f"{offer.kernel.name} (multiples of {offer.lowering.multiple})"
        if offer.lowering.multiple > 1
        else offer.kernel.name
        for offer in part.offers
    ]
    return " or ".join(names if part.is_total else [*names, otherwise])
