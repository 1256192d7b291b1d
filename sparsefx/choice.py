"""Which kernel a packed linear gets: of all that its target has, the fastest that beats dense."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch._ops import OpOverload

from sparsefx.errors import KernelBuildFailed
from sparsefx.guard import Verdict
from sparsefx.target import Inspect, Kernel, LinearSpec, Lowering

CONFIGURATIONS = 8  # kernels of one node that are timed; those guessed best come first
PROPOSALS = 2 * CONFIGURATIONS  # ways to run it that are built: some come out as the same kernel

Ask = Callable[[LinearSpec, Lowering], Verdict]
"""Compares a built kernel with dense on the rows that the spec names. May raise KernelRunFailed."""


@dataclass(frozen=True, eq=False)
class Offer:
    """A kernel that is built for a node."""

    kernel: Kernel
    lowering: Lowering


@dataclass(frozen=True)
class Way:
    """A kernel with its settings, and the spec that it is to be built for."""

    kernel: Kernel
    spec: LinearSpec


@dataclass
class Reasons:
    """Why kernels were not chosen: one reason for each name, that of its best try."""

    _found: dict[str, tuple[float, str]] = field(default_factory=dict)

    def add(self, kernel: Kernel, reason: str, ratio: float = float("inf")) -> None:
        """Notes a reason; `ratio` is sparse over dense where there are times."""
        known = self._found.get(kernel.name)
        if known is None or ratio < known[0]:
            self._found[kernel.name] = ratio, reason

    def __str__(self) -> str:
        return "; ".join(f"{name}: {reason}" for name, (_, reason) in self._found.items())


@dataclass(frozen=True)
class Choice:
    """What became of the offers of one node.

    offer: the one to run, None for dense; verdict: of that offer, or else of the one that came
    closest; None where nothing was asked.
    """

    offer: Offer | None
    verdict: Verdict | None


def proposed(kernels: Sequence[Kernel], specs: Sequence[LinearSpec]) -> Iterator[Way]:
    """The ways to run `kernels` that are worth timing: each one's best guess before any second.

    specs: the node at several numbers of rows, for which a kernel may guess differently.
    """
    asked = (Way(kernel, spec) for spec in specs for kernel in kernels)
    accepted = [way for way in asked if way.kernel.accepts(way.spec) is None]
    ranks = itertools.zip_longest(*(way.kernel.tunings(way.spec) for way in accepted))
    for rank in ranks:
        for way, kernel in zip(accepted, rank, strict=True):
            if kernel is not None:
                yield Way(kernel, way.spec)


def built(ways: Iterable[Way], packed: tuple[Tensor, ...], reasons: Reasons) -> Iterator[Offer]:
    """The first CONFIGURATIONS that compile, each once however many ways lead to it.

    They are compiled side by side: a compiler is a process of its own, for which a thread waits.
    """
    seen: set[tuple[OpOverload, str]] = set()
    waiting = itertools.islice(ways, PROPOSALS)
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        while batch := list(itertools.islice(waiting, CONFIGURATIONS - len(seen))):
            made = pool.map(lambda way: _lowered(way, packed), batch)
            for way, lowering in zip(batch, made, strict=True):
                if not isinstance(lowering, Lowering):
                    reasons.add(way.kernel, str(lowering))
                elif (lowering.op, lowering.handle) not in seen:
                    seen.add((lowering.op, lowering.handle))
                    yield Offer(way.kernel, lowering)


def worth_timing(
    offers: Sequence[Offer], specs: Sequence[LinearSpec], inspect: Inspect, reasons: Reasons
) -> list[Offer]:
    """The offers to which `inspect` does not object at each of the specs."""
    said = iter(inspect([(spec, offer.lowering) for offer in offers for spec in specs]))
    kept = []
    for offer in offers:
        objections = [next(said) for _ in specs]
        if all(objections):
            reasons.add(offer.kernel, objections[0])
        else:
            kept.append(offer)
    return kept


@torch.no_grad()
def _lowered(way: Way, packed: tuple[Tensor, ...]) -> Lowering | Exception:
    try:
        return way.kernel.lower(way.spec, packed)
    except (KernelBuildFailed, OSError) as error:  # OSError: no place to keep the kernel
        return error


def fastest(
    offers: Iterable[Offer], spec: LinearSpec, ask: Ask, proof: bool, reasons: Reasons
) -> Choice:
    """The offer with the best ratio to dense among those that win; without `proof`, of all."""
    fitting = [offer for offer in offers if _fits(offer, spec, reasons)]
    tried = [(each, found) for each in fitting if (found := _asked(each, spec, ask, reasons))]
    tried.sort(key=lambda pair: pair[1].ratio)
    for offer, verdict in tried:
        if not verdict.fault and (verdict.wins or not proof):
            return Choice(offer, verdict)
        reasons.add(offer.kernel, verdict.reason, verdict.ratio)
    return Choice(None, tried[0][1] if tried else None)


def _fits(offer: Offer, spec: LinearSpec, reasons: Reasons) -> bool:
    multiple = offer.lowering.multiple
    fits = multiple == 1 if spec.rows_vary else spec.rows % multiple == 0
    if not fits:
        reasons.add(offer.kernel, f"it takes multiples of {multiple} rows only")
    return fits


def _asked(offer: Offer, spec: LinearSpec, ask: Ask, reasons: Reasons) -> Verdict | None:
    try:
        return ask(spec, offer.lowering)
    except (KernelBuildFailed, OSError) as error:
        reasons.add(offer.kernel, str(error))
        return None
