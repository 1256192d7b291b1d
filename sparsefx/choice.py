"""Which kernel a packed linear gets: of all that its target has, the fastest that beats dense."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from torch import Tensor
from torch._ops import OpOverload

from sparsefx.errors import KernelBuildFailed
from sparsefx.guard import Verdict
from sparsefx.target import Kernel, LinearSpec, Lowering

CONFIGURATIONS = 8  # ways to run one node that are built and timed; those guessed best come first

Ask = Callable[[LinearSpec, Lowering], Verdict]
"""Compares a built kernel with dense on the rows that the spec names. May raise KernelRunFailed."""


@dataclass(frozen=True)
class Offer:
    """A kernel that is built for a node."""

    kernel: Kernel
    lowering: Lowering


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


def configurations(kernels: Sequence[Kernel], spec: LinearSpec) -> tuple[Kernel, ...]:
    """The ways to run `kernels` that are worth timing, at most CONFIGURATIONS.

    Each kernel's best guess comes before any second guess.
    """
    ranks = zip_longest(*(kernel.tunings(spec) for kernel in kernels))
    ordered = (each for rank in ranks for each in rank if each is not None)
    return tuple(dict.fromkeys(ordered))[:CONFIGURATIONS]


def built(
    kernels: Iterable[Kernel], spec: LinearSpec, packed: tuple[Tensor, ...], reasons: Reasons
) -> Iterator[Offer]:
    """Those that compile, each built once however many ways lead to it."""
    seen: set[tuple[OpOverload, str]] = set()
    for kernel in kernels:
        try:
            lowering = kernel.lower(spec, packed)
        except (KernelBuildFailed, OSError) as error:  # OSError: no place to keep the kernel
            reasons.add(kernel, str(error))
            continue
        if (lowering.op, lowering.handle) not in seen:
            seen.add((lowering.op, lowering.handle))
            yield Offer(kernel, lowering)


def fastest(
    offers: Iterable[Offer], spec: LinearSpec, ask: Ask, proof: bool, reasons: Reasons
) -> Choice:
    """The offer with the best ratio to dense among those that win; without `proof`, of all."""
    tried = [(offer, verdict) for offer in offers if (verdict := _asked(offer, spec, ask, reasons))]
    tried.sort(key=lambda pair: pair[1].ratio)
    for offer, verdict in tried:
        if not verdict.fault and (verdict.wins or not proof):
            return Choice(offer, verdict)
        reasons.add(offer.kernel, verdict.reason, verdict.ratio)
    return Choice(None, tried[0][1] if tried else None)


def _asked(offer: Offer, spec: LinearSpec, ask: Ask, reasons: Reasons) -> Verdict | None:
    try:
        return ask(spec, offer.lowering)
    except (KernelBuildFailed, OSError) as error:
        reasons.add(offer.kernel, str(error))
        return None
