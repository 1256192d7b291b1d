"""tightest(): which sparsity pattern the zeros of a weight follow.

Candidates are compared by the bits they store per dense element, at 16-bit values:

    n:m     n/m * (16 + index_bits(m))
    block   (1 - share of zero blocks) * (16 + 32 / elements of a block)
    bitmap  (1 - sparsity) * 16 + 1
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsefx.formats import NM_GROUPS, index_bits
from sparsefx.spec import NM, Block, Pattern, Unstructured

BLOCK_SIZES = (128, 64, 32, 16)
RUN = 16  # blocks of one row, as GQSA prunes them (arXiv 2412.17560)
BLOCK_SHAPES = (*((size, size) for size in BLOCK_SIZES), (1, RUN))
MINIMUM_SPARSITY = 0.25
VALUE_BITS = 16
_COLUMN_BITS = 32  # of a stored block

# n:m and blocks may cost this much more than a bitmap and still be chosen: a fixed number of values
# in each group needs no row offsets, and loops over it have a static length. 7/6 is the least that
# finds every n:m of m = 4, 8, 16 with a quarter of zeros (6:8 stores 15 bits, its bitmap 13).
STRUCTURE_WORTH = 7 / 6

_CHUNK = 1 << 22  # elements looked at in one go; bounds the memory of a scan


@dataclass(frozen=True)
class Found:
    """What a weight's zeros look like.

    pattern: None where storing them packed does not pay; sparsity: share of zeros, in [0, 1];
    reason: why there is no pattern, "" where there is one.
    """

    pattern: Pattern | None
    sparsity: float
    reason: str = ""


@dataclass
class ZeroCount:
    """Statistics of the zeros of a matrix; `-0.0` counts as zero.

    elements; nonzeros; fullest: m -> most nonzeros in any group of m along a row, for each m of
    4, 8, 16 that divides the row length; zero_blocks: size -> (zero blocks, all blocks), for each
    size that divides both dimensions; zero_runs: the same of 1 x RUN blocks, (0, 0) if RUN does not
    divide the row length.
    """

    elements: int
    nonzeros: int = 0
    fullest: dict[int, int] = field(default_factory=dict)
    zero_blocks: dict[int, tuple[int, int]] = field(default_factory=dict)
    zero_runs: tuple[int, int] = (0, 0)

    @property
    def sparsity(self) -> float:
        """Share of zeros, in [0, 1]; 0 for an empty matrix."""
        return 1 - self.nonzeros / self.elements if self.elements else 0.0


def tightest(weight: Tensor) -> Found:
    """The cheapest pattern that holds for the zeros of `weight` [out, in].

    Looks for N:M (m = 4, 8, 16), blocks of 16 x 16 to 128 x 128 and 1 x 16, and unstructured zeros.
    Applying the
    found pattern by magnitude leaves the weight as it is. N:M and blocks win over unstructured up
    to STRUCTURE_WORTH times its bits; among equals larger blocks, then the smaller m.
    """
    zeros = weight.numel() - int(torch.count_nonzero(weight))
    if zeros < MINIMUM_SPARSITY * weight.numel() or not weight.numel():
        sparsity = zeros / max(1, weight.numel())
        return Found(None, sparsity, _too_few(zeros, weight.numel()))
    count = count_zeros(weight)
    costs = _structured_costs(count)
    best = min(costs, key=lambda pattern: costs[pattern], default=None)
    # A packing may store zeros too, so an all-zero weight is one that keeps a single element.
    sparsity = (weight.numel() - max(1, count.nonzeros)) / weight.numel()
    bitmap_bits = (1 - sparsity) * VALUE_BITS + 1
    if best is None or costs[best] > bitmap_bits * STRUCTURE_WORTH:
        return Found(Unstructured(sparsity), count.sparsity)
    return Found(best, count.sparsity)


def count_zeros(weight: Tensor) -> ZeroCount:
    """Scans `weight` [out, in] once, in chunks of rows."""
    out, width = weight.shape
    count = ZeroCount(elements=weight.numel())
    largest = BLOCK_SIZES[0]
    rows = max(largest, _CHUNK // max(1, width) // largest * largest)
    for chunk in torch.split(weight.detach(), rows):
        _add_chunk(count, (chunk != 0).contiguous())
    for size in BLOCK_SIZES:
        if out % size or width % size or not weight.numel():
            count.zero_blocks.pop(size, None)
    return count


def _add_chunk(count: ZeroCount, nonzero: Tensor) -> None:
    rows, width = nonzero.shape
    if width % 4 or not nonzero.numel():
        count.nonzeros += int(nonzero.sum())
        return
    # The bytes of one int32 are four 0/1 flags; the product's top byte is their sum.
    fours = (nonzero.view(torch.int32) * 0x01010101) >> 24
    count.nonzeros += int(fours.sum())
    sums = {4: fours}
    for m in (8, 16):
        if width % m == 0:
            sums[m] = sums[m // 2][:, 0::2] + sums[m // 2][:, 1::2]
    for m, per_group in sums.items():
        count.fullest[m] = max(count.fullest.get(m, 0), int(per_group.max()))
    if width % RUN == 0:
        occupied = sums[RUN] != 0
        zero, runs = count.zero_runs
        count.zero_runs = zero + int((~occupied).sum()), runs + occupied.numel()
        if rows % RUN == 0:
            _add_blocks(count, occupied)


def _add_blocks(count: ZeroCount, occupied: Tensor) -> None:
    """`occupied` [rows, in/16]: whether 16 columns of a row hold a nonzero."""
    grid = occupied.view(-1, 16, occupied.shape[1]).any(1)  # [rows/16, in/16]
    for size in reversed(BLOCK_SIZES):
        zero, blocks = count.zero_blocks.get(size, (0, 0))
        count.zero_blocks[size] = zero + int((~grid).sum()), blocks + grid.numel()
        if grid.shape[0] % 2 or grid.shape[1] % 2:
            return
        grid = grid.view(grid.shape[0] // 2, 2, grid.shape[1] // 2, 2).any(3).any(1)


def _structured_costs(count: ZeroCount) -> dict[Pattern, float]:
    """Bits per dense element of every N:M and block pattern that holds."""
    costs: dict[Pattern, float] = {}
    counts = {(size, size): count.zero_blocks.get(size, (0, 0)) for size in BLOCK_SIZES}
    for (rows, cols), (zero, blocks) in {**counts, (1, RUN): count.zero_runs}.items():
        share = min(zero, blocks - 1) / max(1, blocks)
        if share > 0:
            bits = VALUE_BITS + _COLUMN_BITS / (rows * cols)
            costs[Block(rows, cols, share)] = (1 - share) * bits
    for m in NM_GROUPS:
        n = max(1, count.fullest.get(m, m))
        if n < m:
            costs[NM(n, m)] = n / m * (VALUE_BITS + index_bits(m))
    return costs


def _too_few(zeros: int, elements: int) -> str:
    share = zeros / max(1, elements)
    needed = 100 * MINIMUM_SPARSITY
    return f"{100 * share:.1f} % of the weights are zero; a bitmap needs at least {needed:.0f} %"
