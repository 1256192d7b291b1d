"""What the report on a pruning is made of: one PrunedLayer a weight, and the totals over them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CELLS = 32  # of a heat map along either side, at most
_LARGEST = 2**31  # what a side of a matrix stays below
_MISS = 0.01  # a layer that is further from the sparsity asked of it stands out


@dataclass(frozen=True)
class PrunedLayer:
    """What became of one weight.

    name: its parameter name, "model.layers.0.mlp.up_proj.weight"; block: the repeated block that it
    belongs to, "model.layers.0", or ""; shape: [out, in] of its matrix; pattern: "2:4",
    "unstructured 50%"; criterion: "SparseGPT", "Wanda"; asked: sparsity asked of it; reached: share
    of zeros now; error: ||(W - W')X|| / ||W X|| on the calibration data, None where there was none;
    seconds: that its decision took; bytes: dense, and as stored now; dense_us, sparse_us: predicted
    by the roofline on the target, None where not; heat: share kept in each cell of a grid over the
    matrix (`heat_of`), () where not taken; note: what else happened, "channels reordered".
    """

    name: str
    block: str
    shape: tuple[int, int]
    pattern: str
    criterion: str
    asked: float
    reached: float
    error: float | None
    seconds: float
    dense_bytes: int
    stored_bytes: int
    dense_us: float | None
    sparse_us: float | None
    heat: tuple[tuple[float, ...], ...]
    note: str = ""

    @property
    def label(self) -> str:
        """The name without the ".weight" that nearly all have in common."""
        return self.name.removesuffix(".weight")

    @property
    def weights(self) -> int:
        """Number of elements of the matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def zeros(self) -> int:
        """Number of zeros; 0 where `reached` is no share."""
        return round(self.reached * self.weights) if 0 <= self.reached <= 1 else 0

    @property
    def missed(self) -> bool:
        """Whether the sparsity reached is more than one point away from the one asked."""
        return not abs(self.reached - self.asked) <= _MISS + 1e-9  # 0.51 - 0.5 is above 0.01

    @property
    def gain(self) -> float | None:
        """dense_us / sparse_us, or None where a time is missing."""
        if self.dense_us is None or not self.sparse_us:
            return None
        return self.dense_us / self.sparse_us

    def violations(self) -> list[str]:
        """What cannot be so: a share above 1, a time that is NaN, a ragged heat map; else []."""
        numbers = {
            "error": self.error,
            "seconds": self.seconds,
            "dense_us": self.dense_us,
            "sparse_us": self.sparse_us,
            "dense_bytes": self.dense_bytes,
            "stored_bytes": self.stored_bytes,
        }
        found = [
            f"{field} is {value}"
            for field, value in numbers.items()
            if value is not None and not 0 <= value < math.inf
        ]
        shares = (("asked", self.asked), ("reached", self.reached))
        found += [f"{field} is {value}, no share" for field, value in shares if not 0 <= value <= 1]
        if not 1 <= min(self.shape) <= max(self.shape) < _LARGEST:
            found.append(f"shape is {list(self.shape)}")
        if not _is_grid(self.heat):
            found.append(f"heat is no grid of shares, at most {CELLS} x {CELLS}")
        return [f"{self.name}: {text}" for text in found]


def _is_grid(heat: tuple[tuple[float, ...], ...]) -> bool:
    if not heat:
        return True
    widths = {len(row) for row in heat}
    small = len(heat) <= CELLS and len(widths) == 1 and 1 <= min(widths) <= CELLS
    return small and all(0 <= share <= 1 for row in heat for share in row)


@dataclass(frozen=True)
class PruneTotals:
    """Sums over layers.

    weights, zeros: numbers of elements; asked, reached: sparsity, weighted by size; mean_error: of
    the layers that have one, each counting once; worst: the layer of the largest error; predicted:
    how many layers have both times, which dense_us and sparse_us add up.
    """

    layers: int
    weights: int
    zeros: int
    asked: float
    reached: float
    mean_error: float | None
    worst: PrunedLayer | None
    seconds: float
    dense_bytes: int
    stored_bytes: int
    predicted: int
    dense_us: float
    sparse_us: float

    @property
    def gain(self) -> float | None:
        """dense_us / sparse_us, or None where nothing was predicted."""
        return self.dense_us / self.sparse_us if self.sparse_us else None


def total(layers: Sequence[PrunedLayer]) -> PruneTotals:
    """The sums over `layers`."""
    weights = sum(layer.weights for layer in layers)
    errors = [(layer.error, layer) for layer in layers if layer.error is not None]
    # NaN, with which every comparison fails, is worse than any number.
    worst = max(errors, key=lambda pair: (math.isnan(pair[0]), pair[0]), default=None)
    times = [
        (layer.dense_us, layer.sparse_us)
        for layer in layers
        if layer.dense_us is not None and layer.sparse_us is not None
    ]
    return PruneTotals(
        layers=len(layers),
        weights=weights,
        zeros=sum(layer.zeros for layer in layers),
        asked=_mean([(layer.asked, layer.weights) for layer in layers]),
        reached=_mean([(layer.reached, layer.weights) for layer in layers]),
        mean_error=_mean([(error, 1) for error, _ in errors]) if errors else None,
        worst=worst[1] if worst else None,
        seconds=sum(layer.seconds for layer in layers),
        dense_bytes=sum(layer.dense_bytes for layer in layers),
        stored_bytes=sum(layer.stored_bytes for layer in layers),
        predicted=len(times),
        dense_us=sum(dense for dense, _ in times),
        sparse_us=sum(sparse for _, sparse in times),
    )


def _mean(values: Sequence[tuple[float, int]]) -> float:
    """Of (value, weight) pairs; 0 for none."""
    weight = sum(count for _, count in values)
    return sum(value * count for value, count in values) / weight if weight else 0.0


def heat_of(keep: Tensor) -> tuple[tuple[float, ...], ...]:
    """The share of True in each cell of a grid of at most CELLS x CELLS over keep, bool [out, in].

    Cells are of one size, but for the last ones, and do not overlap. Shares have four decimals.
    Memory beyond `keep`: CELLS rows of int64.
    """
    rows = keep.split(_cell(keep.shape[0]))
    bands = torch.stack([part.sum(0) for part in rows])  # [<= CELLS, in]
    columns = bands.split(_cell(keep.shape[1]), dim=1)
    kept = torch.stack([part.sum(1) for part in columns], dim=1).tolist()
    heights, widths = [part.shape[0] for part in rows], [part.shape[1] for part in columns]
    return tuple(
        tuple(round(n / (height * width), 4) for n, width in zip(line, widths, strict=True))
        for line, height in zip(kept, heights, strict=True)
    )


def _cell(side: int) -> int:
    """The side of a cell: no group of 2, 4 or 8 crosses it, which would look like structure."""
    return 8 * math.ceil(side / (8 * CELLS)) if side > CELLS else 1
