"""Sparsity patterns of weights and the criteria that rank them: frozen dataclasses."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefx.errors import InvalidPattern


@dataclass(frozen=True)
class Magnitude:
    """Keep the weights of largest absolute value (Han et al. 2015, arXiv 1506.02626)."""

    def scores(self, weight: Tensor) -> Tensor:
        """Importance of each weight, float32, same shape as `weight`; larger is kept."""
        return weight.detach().abs().float()


Criterion = Magnitude


@dataclass(frozen=True)
class Unstructured:
    """Any position may be zero; `sparsity` is the share of zeros in each weight, in [0, 1)."""

    sparsity: float
    criterion: Criterion = Magnitude()

    def __post_init__(self) -> None:
        _check_sparsity(self, self.sparsity)

    def __str__(self) -> str:
        return f"unstructured {self.sparsity:.0%}"

    def misfit(self, shape: torch.Size) -> str | None:
        """Why the pattern cannot be laid on a [out, in] weight of this shape, or None."""
        return None

    def keep(self, scores: Tensor) -> Tensor:
        """Bool [out, in], True where the weight stays: the highest scores of the whole tensor.

        Ties go to the lower index, so that the count is exact and the mask deterministic.
        """
        drop = int(self.sparsity * scores.numel())
        order = scores.flatten().sort(stable=True, descending=True).indices
        keep = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
        keep[order[scores.numel() - drop :]] = False
        return keep.view(scores.shape)


@dataclass(frozen=True)
class NM:
    """N:M sparsity: N weights **kept** out of each M consecutive ones along the input dimension.

    2:4 is the pattern of sparse tensor cores (Mishra et al. 2021, arXiv 2104.08378).
    """

    n: int
    m: int
    criterion: Criterion = Magnitude()

    def __post_init__(self) -> None:
        if not _whole(self.n, self.m) or not 0 < self.n < self.m:
            raise InvalidPattern(
                pattern=f"NM({self.n}, {self.m})",
                rule="n counts the weights kept of each m and 0 < n < m must hold",
                remedy="2:4 is NM(2, 4)",
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """Share of zeros, in (0, 1)."""
        return 1 - self.n / self.m

    def misfit(self, shape: torch.Size) -> str | None:
        """Why the pattern cannot be laid on a [out, in] weight of this shape, or None."""
        if shape[1] % self.m:
            return f"{shape[1]} input features are not a multiple of m={self.m}"
        return None

    def keep(self, scores: Tensor) -> Tensor:
        """Bool [out, in], True where the weight stays: the n highest scores of each group of m.

        Ties go to the lower index.
        """
        groups = scores.reshape(scores.shape[0], -1, self.m)
        order = groups.sort(dim=-1, stable=True, descending=True).indices[..., : self.n]
        keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True)
        return keep.view(scores.shape)


@dataclass(frozen=True)
class Block:
    """Whole `rows` x `cols` tiles of the weight are zero; `sparsity` is the share of zero tiles."""

    rows: int
    cols: int
    sparsity: float
    criterion: Criterion = Magnitude()

    def __post_init__(self) -> None:
        _check_sparsity(self, self.sparsity)
        if not _whole(self.rows, self.cols) or self.rows < 1 or self.cols < 1:
            raise InvalidPattern(
                pattern=f"Block({self.rows}, {self.cols})",
                rule="a block has at least one row and one column",
                remedy="32 x 32 blocks are Block(32, 32, sparsity)",
            )

    def __str__(self) -> str:
        return f"block {self.rows}x{self.cols} {self.sparsity:.0%}"

    def misfit(self, shape: torch.Size) -> str | None:
        """Why the pattern cannot be laid on a [out, in] weight of this shape, or None."""
        if shape[0] % self.rows or shape[1] % self.cols:
            return f"{shape[0]} x {shape[1]} is not a grid of {self.rows} x {self.cols} blocks"
        return None

    def keep(self, scores: Tensor) -> Tensor:
        """Bool [out, in], True where the weight stays: the blocks of highest summed score."""
        out, width = scores.shape
        tiles = scores.reshape(out // self.rows, self.rows, width // self.cols, self.cols)
        kept = Unstructured(self.sparsity).keep(tiles.sum((1, 3)))
        return kept[:, None, :, None].expand(tiles.shape).reshape(scores.shape)


Pattern = Unstructured | NM | Block


def _whole(*numbers: object) -> bool:
    return all(isinstance(number, int) for number in numbers)


def _check_sparsity(pattern: object, sparsity: object) -> None:
    if not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise InvalidPattern(
            pattern=f"{type(pattern).__name__}(sparsity={sparsity})",
            rule="sparsity is the share of zeros and must lie in [0, 1)",
            remedy="Half of the weights is 0.5, not 50",
        )
