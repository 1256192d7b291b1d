"""What calibration keeps of a layer's input: one statistic a class, added up over batches.

Each takes rows x [n, in], one for each token (or output pixel of a convolution) that counts, of
`samples` sequences. Sums add up over batches and over processes, so `tensors` is what a state file
keeps and what torch.distributed reduces.
"""

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from sparsefx.calibrate import together


class Statistic(Protocol):
    """A sum over the rows of a layer's input, of width `features`."""

    def __init__(self, features: int, device: torch.device) -> None: ...

    def add(self, x: Tensor, samples: int) -> None:
        """Adds rows x [n, features] of any float dtype, from `samples` sequences."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The sums themselves, not copies; what is written into them is taken over."""


class SquareSum:
    """Sum of squares of each feature, float64; count: rows, samples [2]."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.squares = torch.zeros(features, dtype=torch.float64, device=device)
        self.count = torch.zeros(2, dtype=torch.int64, device=device)

    def add(self, x: Tensor, samples: int) -> None:
        """As Statistic."""
        self.squares += x.float().square().sum(0, dtype=torch.float64)
        self.count += torch.tensor([x.shape[0], samples], device=self.count.device)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """As Statistic."""
        return {"squares": self.squares, "count": self.count}

    @property
    def norms(self) -> Tensor:
        """L2 norm of each feature over all rows, float64 [features]."""
        return self.squares.sqrt()


class Moments(SquareSum):
    """Sum and sum of squares of each feature, float64."""

    def __init__(self, features: int, device: torch.device) -> None:
        super().__init__(features, device)
        self.sums = torch.zeros_like(self.squares)

    def add(self, x: Tensor, samples: int) -> None:
        """As Statistic."""
        super().add(x, samples)
        self.sums += x.float().sum(0, dtype=torch.float64)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """As Statistic."""
        return super().tensors | {"sums": self.sums}

    @property
    def mean(self) -> Tensor:
        """Mean of each feature over the rows, float64 [features]."""
        return self.sums / self.count[0]

    @property
    def variance(self) -> Tensor:
        """Population variance of each feature over the rows, float64 [features], at least 0."""
        return (self.squares / self.count[0] - self.mean.square()).clamp(min=0)


class Gram:
    """X^T X of the rows, float32 [features, features]; half the Hessian of the squared error.

    Batches are added to the upper triangle, in bands; the lower one is its mirror image, drawn when
    somebody looks: a third less work than the whole product.
    """

    BAND = 256

    def __init__(self, features: int, device: torch.device) -> None:
        self._sums = torch.zeros(features, features, dtype=torch.float32, device=device)
        self._is_whole = True
        self.count = torch.zeros(2, dtype=torch.int64, device=device)

    def add(self, x: Tensor, samples: int) -> None:
        """As Statistic."""
        x = x.float()
        for start, end in self._bands():
            self._sums[start:end, start:].addmm_(x[:, start:end].T, x[:, start:])
        self._is_whole = False
        self.count += torch.tensor([x.shape[0], samples], device=self.count.device)

    @property
    def gram(self) -> Tensor:
        """The whole X^T X; not a copy."""
        if not self._is_whole:
            for start, end in self._bands():
                self._sums[end:, start:end] = self._sums[start:end, end:].T
            self._is_whole = True
        return self._sums

    @property
    def tensors(self) -> dict[str, Tensor]:
        """As Statistic."""
        return {"gram": self.gram, "count": self.count}

    @property
    def norms(self) -> Tensor:
        """L2 norm of each feature over all rows, float64 [features]."""
        return self._sums.diagonal().double().sqrt()

    def _bands(self) -> Iterator[tuple[int, int]]:
        size = self._sums.shape[0]
        return ((start, min(start + self.BAND, size)) for start in range(0, size, self.BAND))


class Sketch:
    """ROWS random sums of the rows, float32 [ROWS, features], whose products estimate X^T X.

    Each row is added to one of them under a random sign (a count sketch, Charikar et al. 2002): the
    squared norm of D X^T is then expected to be that of D S^T, exact over the first ROWS rows, and
    off by some sqrt(2 / ROWS) at most where one direction has it all. Rows far larger than others,
    as those of attention sinks, count whole, which in a sample of rows they may not. Far less work
    than a Gram: one addition for each number that is read.
    """

    ROWS = 512

    def __init__(self, features: int, device: torch.device) -> None:
        self.sums = torch.zeros(self.ROWS, features, dtype=torch.float32, device=device)
        self._rows, self._shift = 0, 0
        self._random = torch.Generator().manual_seed(together.rank())

    def add(self, x: Tensor, samples: int) -> None:
        """As Statistic."""
        x = x.float()
        while len(x):
            at = (self._rows + self._shift) % self.ROWS
            room = min(self.ROWS - at, self.ROWS - self._rows % self.ROWS)
            part, x = x[:room], x[room:]
            signs = torch.randint(0, 2, (len(part), 1), generator=self._random) * 2 - 1
            self.sums[at : at + len(part)] += part * signs.to(part.device)
            self._rows += len(part)
            if self._rows % self.ROWS == 0:  # else tokens at one place of their texts would meet
                self._shift = int(torch.randint(0, self.ROWS, (1,), generator=self._random))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """As Statistic."""
        return {"sums": self.sums}


class AbsHistogram:
    """How many entries of all features have |x| in each of BINS bins, evenly spaced in log |x|.

    The first bin also has everything smaller, zeros included, the last everything larger.
    """

    BINS = 512
    SMALLEST, LARGEST = 2.0**-24, 2.0**16

    def __init__(self, features: int, device: torch.device) -> None:
        self.counts = torch.zeros(self.BINS, dtype=torch.int64, device=device)

    def add(self, x: Tensor, samples: int) -> None:
        """As Statistic."""
        span = math.log2(self.LARGEST / self.SMALLEST)
        place = (x.float().abs().clamp(min=self.SMALLEST).log2() - math.log2(self.SMALLEST)) / span
        bins = (place * self.BINS).long().clamp(max=self.BINS - 1)
        self.counts += torch.bincount(bins.flatten(), minlength=self.BINS)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """As Statistic."""
        return {"counts": self.counts}

    def quantile(self, share: float) -> float:
        """The upper edge of the first bin up to which `share` of the entries lie."""
        reached = self.counts.cumsum(0) >= share * self.counts.sum()
        index = int(reached.int().argmax())
        return float(self.SMALLEST * (self.LARGEST / self.SMALLEST) ** ((index + 1) / self.BINS))


STATISTICS: dict[str, type[Statistic]] = {
    "squares": SquareSum,
    "moments": Moments,
    "gram": Gram,
    "sketch": Sketch,
    "histogram": AbsHistogram,
}
"""What a criterion may ask for in `needs`, by name."""

FOR_REPORTS = frozenset({"sketch"})
"""What nothing is decided from: a weight that no batch runs does without."""
