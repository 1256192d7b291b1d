"""Criteria: by what the weights that stay are chosen, as frozen dataclasses.

Each says in `needs` which statistics of the layer's input it asks for (the names of
`sparsefx.calibrate.statistics.STATISTICS`) and in `updates` whether it changes the weights that
stay. `sparsefx.prune.solve` applies them.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsefx.errors import InvalidCriterion

_NOTHING: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Magnitude:
    """Keep the weights of largest absolute value (Han et al. 2015, arXiv 1506.02626)."""

    needs: ClassVar[frozenset[str]] = _NOTHING
    updates: ClassVar[bool] = False

    def scores(self, weight: Tensor) -> Tensor:
        """Importance of each weight, float32, same shape as `weight`; larger is kept."""
        return weight.detach().abs().float()


@dataclass(frozen=True)
class Random:
    """Keep a random subset of exactly the asked size: the baseline that knows nothing.

    The same seed and shape give the same subset on every device; weights of one shape are told
    apart by passing another seed.
    """

    seed: int = 0

    needs: ClassVar[frozenset[str]] = _NOTHING
    updates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not _whole(self.seed) or not 0 <= self.seed < 2**63:
            raise _invalid(self, f"seed={self.seed!r} must be a whole number in [0, 2^63)")

    def scores(self, weight: Tensor) -> Tensor:
        """Uniform float32 in [0, 1), same shape as `weight`; larger is kept."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(weight.shape, generator=generator).to(weight.device)


@dataclass(frozen=True)
class Wanda:
    """Keep the largest |W[i, j]| * ||X[:, j]||_2 of each output row (Sun et al., arXiv 2306.11695).

    N:M compares within its groups; blocks, rows and columns compare summed scores.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"squares"})
    updates: ClassVar[bool] = False


@dataclass(frozen=True)
class SparseGPT:
    """Prune column by column and let later columns make up for it (Frantar & Alistarh 2023).

    damp: share of the mean of diag(X^T X) added to the diagonal; block: columns updated in one go,
    and, unstructured, ranked in one go (arXiv 2301.00774).
    """

    damp: float = 0.01
    block: int = 128

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    updates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not _real(self.damp) or self.damp <= 0:
            raise _invalid(self, f"damp={self.damp!r} must be a number above 0")
        if not _whole(self.block) or not 0 < self.block < 2**31:
            raise _invalid(self, f"block={self.block!r} must be a whole number from 1 on")


@dataclass(frozen=True)
class DSnoT:
    """Refine the mask of `start` by swaps that cancel each row's expected error (Zhang et al.).

    cycles: most swaps in a row; tolerance: expected error, summed over a sample's tokens, below
    which a row is left alone; guard: keep the old mask of each row whose squared output error the
    swaps do not lower, as they often raise it (arXiv 2310.08915).
    """

    start: Magnitude | Random | Wanda | SparseGPT = Wanda()
    cycles: int = 50
    tolerance: float = 0.1
    guard: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.start, Magnitude | Random | Wanda | SparseGPT):
            raise _invalid(self, "start must be Magnitude, Random, Wanda or SparseGPT")
        if not _whole(self.cycles) or not 0 < self.cycles < 2**31:
            raise _invalid(self, f"cycles={self.cycles!r} must be a whole number from 1 on")
        if not _real(self.tolerance) or self.tolerance < 0:
            raise _invalid(self, f"tolerance={self.tolerance!r} must be a number from 0 on")
        if not isinstance(self.guard, bool):
            raise _invalid(self, f"guard={self.guard!r} must be True or False")

    @property
    def needs(self) -> frozenset[str]:
        """Names of the statistics that are asked for; moments hold the squares too."""
        guard = {"gram"} if self.guard else _NOTHING
        return (self.start.needs | {"moments"} | guard) - {"squares"}

    @property
    def updates(self) -> bool:
        """Whether weights that stay change: they do where `start` changes them."""
        return self.start.updates


@dataclass(frozen=True)
class Reconstruct:
    """Choose as `start` does, then set the kept weights to the least squared output error.

    Least squares on the calibration data, row by row, no row worse than `start` on them. damp:
    share of the mean of diag(X^T X) added to the diagonal; it holds weights near their dense values
    where the data say little. Few calibration tokens are fitted more closely than others are.
    """

    start: Magnitude | Random | Wanda | SparseGPT | DSnoT = Wanda()
    damp: float = 0.1

    updates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.start, Magnitude | Random | Wanda | SparseGPT | DSnoT):
            raise _invalid(self, "start must be Magnitude, Random, Wanda, SparseGPT or DSnoT")
        if not _real(self.damp) or self.damp <= 0:
            raise _invalid(self, f"damp={self.damp!r} must be a number above 0")

    @property
    def needs(self) -> frozenset[str]:
        """Names of the statistics that are asked for; the gram has the squares too."""
        return (self.start.needs | {"gram"}) - {"squares"}


Criterion = Magnitude | Random | Wanda | SparseGPT | DSnoT | Reconstruct


def _whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def _real(number: object) -> bool:
    return (
        isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
    )


def _invalid(criterion: object, rule: str) -> InvalidCriterion:
    return InvalidCriterion(criterion=type(criterion).__name__, rule=rule)
