"""Sparsity patterns of weights: frozen dataclasses that turn scores into a mask.

Each says as well how the weights that stay are stored (`Stored`): as they are, or as codes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefx.criteria import Criterion as Criterion
from sparsefx.criteria import DSnoT, Reconstruct
from sparsefx.criteria import Magnitude as Magnitude
from sparsefx.errors import InvalidPattern
from sparsefx.quantise import LARGEST

_BY_KIND = -1  # stands for the kind's own group until the pattern is made
_GROUP_STEP = 16  # whole groups of N:M, and bytes of a bitmap

_MAGNITUDE = Magnitude()


@dataclass(frozen=True, kw_only=True)
class Stored:
    """How the weights that a pattern keeps are stored.

    values: "" in the weight's dtype; "int8", "int4", "fp8" (e4m3) as codes, each w = code * scale;
    "int8_dynamic" as int8, and the layer's input is rounded to int8 at run time as well. group:
    input columns to a scale, a multiple of 16, or 0 for one scale a row; by default 128 for int4
    and else 0. Blocks have a scale each, and no group.
    """

    values: str = ""
    group: int = _BY_KIND

    def _check_values(self) -> None:
        """Raises InvalidPattern; puts the default group in."""
        is_block = isinstance(self, Block)
        if self.values not in ("", *LARGEST):
            rule = f"values are one of {', '.join(LARGEST)}, or '' for the weight's own type"
            raise self._invalid(rule, 'Four-bit codes are values="int4"')
        if self.group == _BY_KIND:
            object.__setattr__(self, "group", self._usual_group)
        if not _whole(self.group) or self.group < 0 or self.group % _GROUP_STEP:
            rule = f"group={self.group!r} is neither 0 nor a multiple of {_GROUP_STEP}"
            raise self._invalid(rule, "group=128 has a scale for 128 input columns")
        if self.group and (is_block or not self.values):
            what = "a block has one scale" if is_block else "only codes have scales"
            raise self._invalid(f"group={self.group}, and {what}", "Leave group out")

    def _invalid(self, rule: str, remedy: str) -> InvalidPattern:
        name = type(self).__name__
        return InvalidPattern(pattern=f"{name}(values={self.values!r})", rule=rule, remedy=remedy)

    @property
    def suffix(self) -> str:
        """What a pattern's text says of the values: "", " int4", " int4/64" for groups of 64."""
        if not self.values:
            return ""
        is_usual = self.group == self._usual_group
        return f" {self.values}" if is_usual else f" {self.values}/{self.group or 'row'}"

    @property
    def _usual_group(self) -> int:
        return 128 if self.values == "int4" and not isinstance(self, Block) else 0

    def tile(self, in_features: int) -> tuple[int, int]:
        """What of a weight [out, in_features] shares a scale: 1 x columns, or the block."""
        if isinstance(self, Block):
            return self.rows, self.cols
        return 1, self.group or max(1, in_features)


@dataclass(frozen=True)
class Unstructured(Stored):
    """Any position may be zero; `sparsity` is the share of zeros in each weight, in [0, 1)."""

    sparsity: float
    criterion: Criterion = _MAGNITUDE

    def __post_init__(self) -> None:
        _check_sparsity(self, self.sparsity)
        _check_criterion(self, self.criterion)
        self._check_values()

    def __str__(self) -> str:
        return f"unstructured {self.sparsity:.0%}{self.suffix}"

    def misfit(self, shape: torch.Size) -> str | None:
        """Why the pattern cannot be laid on a [out, in] weight of this shape, or None."""
        return None

    def keep(self, scores: Tensor) -> Tensor:
        """Bool [out, in], True where the weight stays: the highest scores of the whole tensor.

        Ties go to the lower index, so that the count is exact and the mask deterministic.
        """
        drop = int(self.sparsity * scores.numel())
        return keep_highest(scores.flatten(), scores.numel() - drop).view(scores.shape)


@dataclass(frozen=True)
class NM(Stored):
    """N:M sparsity: N weights **kept** out of each M consecutive ones along the input dimension.

    2:4 is the pattern of sparse tensor cores (Mishra et al. 2021, arXiv 2104.08378).
    """

    n: int
    m: int
    criterion: Criterion = _MAGNITUDE

    def __post_init__(self) -> None:
        if not _whole(self.n, self.m) or not 0 < self.n < self.m:
            raise InvalidPattern(
                pattern=f"NM({self.n}, {self.m})",
                rule="n counts the weights kept of each m and 0 < n < m must hold",
                remedy="2:4 is NM(2, 4)",
            )
        _check_criterion(self, self.criterion)
        self._check_values()

    def __str__(self) -> str:
        return f"{self.n}:{self.m}{self.suffix}"

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
        return keep_highest(groups, self.n).view(scores.shape)


@dataclass(frozen=True)
class Block(Stored):
    """Whole `rows` x `cols` tiles of the weight are zero; `sparsity` is the share of zero tiles."""

    rows: int
    cols: int
    sparsity: float
    criterion: Criterion = _MAGNITUDE

    def __post_init__(self) -> None:
        _check_whole_parts(self, self.sparsity, self.criterion)
        self._check_values()
        if not _whole(self.rows, self.cols) or self.rows < 1 or self.cols < 1:
            raise InvalidPattern(
                pattern=f"Block({self.rows}, {self.cols})",
                rule="a block has at least one row and one column",
                remedy="32 x 32 blocks are Block(32, 32, sparsity)",
            )

    def __str__(self) -> str:
        return f"block {self.rows}x{self.cols} {self.sparsity:.0%}{self.suffix}"

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


@dataclass(frozen=True)
class Rows(Stored):
    """Whole output rows of the weight are zero; `sparsity` is the share of zero rows, in [0, 1)."""

    sparsity: float
    criterion: Criterion = _MAGNITUDE

    def __post_init__(self) -> None:
        _check_whole_parts(self, self.sparsity, self.criterion)
        self._check_values()

    def __str__(self) -> str:
        return f"rows {self.sparsity:.0%}{self.suffix}"

    def misfit(self, shape: torch.Size) -> str | None:
        """Why the pattern cannot be laid on a [out, in] weight of this shape, or None."""
        return None

    def keep(self, scores: Tensor) -> Tensor:
        """Bool [out, in], True where the weight stays: the rows of highest summed score."""
        kept = Unstructured(self.sparsity).keep(scores.sum(1))
        return kept[:, None].expand(scores.shape).contiguous()


@dataclass(frozen=True)
class Columns(Stored):
    """Whole input columns of the weight are zero; `sparsity` is the share of zero columns.

    A column of a convolution is one tap of one input channel.
    """

    sparsity: float
    criterion: Criterion = _MAGNITUDE

    def __post_init__(self) -> None:
        _check_whole_parts(self, self.sparsity, self.criterion)
        self._check_values()

    def __str__(self) -> str:
        return f"columns {self.sparsity:.0%}{self.suffix}"

    def misfit(self, shape: torch.Size) -> str | None:
        """Why the pattern cannot be laid on a [out, in] weight of this shape, or None."""
        return None

    def keep(self, scores: Tensor) -> Tensor:
        """Bool [out, in], True where the weight stays: the columns of highest summed score."""
        kept = Unstructured(self.sparsity).keep(scores.sum(0))
        return kept.expand(scores.shape).contiguous()


Pattern = Unstructured | NM | Block | Rows | Columns


def keep_highest(scores: Tensor, count: int) -> Tensor:
    """Bool, shape of `scores` [..., n]: the `count` highest along the last dimension.

    Exactly `count`, whatever the ties: those go to the lower index. Scores are not NaN.
    """
    if scores.shape[-1] <= _SMALL and scores.dim() > 1:
        return _keep_by_rank(scores, count)
    drop = scores.shape[-1] - count
    if drop == 0 or not scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(drop, dim=-1, keepdim=True).values
    keep = scores > threshold
    missing = count - keep.sum(-1, keepdim=True)
    if missing.any():
        tied = scores == threshold
        keep |= tied & (tied.cumsum(-1, dtype=torch.int32) <= missing)
    return keep


_SMALL = 8  # up to here n * n comparisons of whole vectors beat a selection in each short one


def _keep_by_rank(scores: Tensor, count: int) -> Tensor:
    """keep_highest by counting, for each entry, how many of the others go before it."""
    entries = scores.unbind(-1)
    before = torch.zeros((len(entries), *entries[0].shape), dtype=torch.int8, device=scores.device)
    for second in range(len(entries)):
        for first in range(second):
            ahead = entries[first] >= entries[second]
            before[second] += ahead
            before[first] += ~ahead
    return (before < count).movedim(0, -1).contiguous()


def _whole(*numbers: object) -> bool:
    return all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)


def _check_criterion(pattern: object, criterion: object) -> None:
    if not isinstance(criterion, Criterion):
        raise InvalidPattern(
            pattern=f"{type(pattern).__name__}(criterion={criterion!r})",
            rule="the criterion is an instance of one of the criteria",
            remedy="Write Wanda() or SparseGPT(), with brackets",
        )


def _check_whole_parts(pattern: object, sparsity: object, criterion: Criterion) -> None:
    """Of a pattern that prunes whole parts of a weight."""
    _check_sparsity(pattern, sparsity)
    _check_criterion(pattern, criterion)
    if isinstance(criterion, Reconstruct):
        criterion = criterion.start
    if isinstance(criterion, DSnoT):
        raise InvalidPattern(
            pattern=f"{type(pattern).__name__}(criterion=DSnoT())",
            rule="DSnoT swaps single weights, which would leave parts of blocks, rows and columns",
            remedy="Choose another criterion, or Unstructured or NM for DSnoT",
        )


def _check_sparsity(pattern: object, sparsity: object) -> None:
    if not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise InvalidPattern(
            pattern=f"{type(pattern).__name__}(sparsity={sparsity})",
            rule="sparsity is the share of zeros and must lie in [0, 1)",
            remedy="Half of the weights is 0.5, not 50",
        )
