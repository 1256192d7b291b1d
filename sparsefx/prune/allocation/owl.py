"""OWL: blocks of a model with more outliers stay denser (Yin et al. 2023, arXiv 2310.05175).

    A_b = |W| * ||X|| of all layers of block b           Wanda's scores, dense model
    D_b = 100 mean(A_b > outlier * mean(A_b))            percent of outliers
    v_b = (D_b - min D) / (max D - min D) * 2 spread     0 for all if D is the same everywhere
    density_b = clip(v_b + t)                            t such that the mean is 1 - sparsity

Where nothing is clipped, t = 1 - sparsity - mean(v), which is the paper's rule. The paper clips
afterwards and misses the budget; here t makes up for it, and blocks still differ by 2 * spread at
most. Means weigh a block by its parameters: the paper's plain mean for blocks of one size.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparsefx.errors import InvalidAllocation
from sparsefx.prune.allocation.layers import Layer, check_sparsity, total

Floats = NDArray[np.float64]

# No block is emptied: it keeps this density, or that of a uniform allocation where that is lower.
LEAST_DENSITY = 0.01

_CHUNK = 1 << 20  # elements scored in one go; bounds the memory of a scan


def outlier_share(block: Sequence[tuple[Tensor, Tensor]], outlier: float) -> float:
    """Percent of a block's Wanda scores |W| * ||X|| above `outlier` times their mean.

    block: weight [out, in] and norms [in] of the inputs' features, of each layer. Scores, sums and
    the comparison are float64; memory beyond the weights is that of some million numbers. 0 for a
    block without weights, or whose scores are all 0.
    """
    count = sum(weight.numel() for weight, _ in block)
    if not count:
        return 0.0
    sums = [float(scores.sum()) for weight, norms in block for scores in _scores(weight, norms)]
    limit = outlier * math.fsum(sums) / count
    above = sum(
        int((scores > limit).sum()) for weight, norms in block for scores in _scores(weight, norms)
    )
    return 100 * above / count


def _scores(weight: Tensor, norms: Tensor) -> Iterable[Tensor]:
    rows = max(1, _CHUNK // max(1, weight.shape[1]))
    scale = norms.to(weight.device, torch.float64)
    return (chunk.double().abs() * scale for chunk in weight.detach().split(rows))


def owl(
    layers: Sequence[Layer], outliers: Mapping[str, float], sparsity: float, spread: float
) -> dict[str, float]:
    """Sparsity of each layer by name, the same in all layers of a block.

    outliers: block -> its `outlier_share`. The mean over blocks, weighted by their parameters, is
    `sparsity`; blocks differ by at most 2 * spread; no density falls below LEAST_DENSITY (or
    1 - sparsity if that is less). Raises InvalidAllocation for a sparsity outside [0, 1) or a share
    that is no number.
    """
    check_sparsity(sparsity)
    sizes = _sizes(layers)
    wanted = _normalised(outliers, sizes) * 2 * spread
    least = min(LEAST_DENSITY, 1 - sparsity)
    density = _shifted(wanted, np.array([*sizes.values()]), 1 - sparsity, least, 1.0)
    found = dict(zip(sizes, 1 - density, strict=True))
    return {layer.name: max(0.0, float(found[layer.block])) for layer in layers}


def owl_nm(
    layers: Sequence[Layer], outliers: Mapping[str, float], n: int, m: int, nm_spread: float
) -> dict[str, int]:
    """How many of each `m` weights every layer keeps, by name: mixed N:M around n:m.

    The same rule with n in place of density and a range of `nm_spread`: from 1 to m - 1, and whole.
    Rounded by largest remainder, so that the model keeps no more than n:m in all layers would, and
    exactly as much if the blocks are of one size. Raises InvalidAllocation as `owl`.
    """
    sizes = _sizes(layers)
    counts = np.array([*sizes.values()])
    wanted = _shifted(_normalised(outliers, sizes) * nm_spread, counts, n, 1, m - 1)
    kept = _rounded(wanted, [*sizes.values()], n)
    found = dict(zip(sizes, kept, strict=True))
    return {layer.name: found[layer.block] for layer in layers}


def _sizes(layers: Sequence[Layer]) -> dict[str, int]:
    """Parameters of each block, in the order in which blocks appear."""
    blocks = dict.fromkeys(layer.block for layer in layers)
    return {block: total([each for each in layers if each.block == block]) for block in blocks}


def _normalised(outliers: Mapping[str, float], sizes: Mapping[str, int]) -> Floats:
    """(D - min D) / (max D - min D), 0 where all are alike."""
    for block in sizes:
        if not math.isfinite(outliers[block]):
            raise InvalidAllocation(
                what=f"the share of outliers {outliers[block]} of {block}",
                rule="it is a percentage",
                remedy="Look for bad weights or bad calibration inputs",
            )
    shares = np.array([outliers[block] for block in sizes], dtype=np.float64)
    span = np.ptp(shares) if len(shares) else 0.0
    return (shares - shares.min()) / span if span else np.zeros_like(shares)


def _shifted(
    wanted: Floats, sizes: NDArray[np.int64], mean: float, low: float, high: float
) -> Floats:
    """clip(wanted + t, low, high) with the mean, weighted by sizes, that is asked for.

    The mean rises with t and is linear between the points at which a block is clipped.
    """
    if not len(wanted):
        return wanted
    weights = sizes / sizes.sum()
    knots = np.unique(np.concatenate((low - wanted, high - wanted)))
    means = [float(np.clip(wanted + knot, low, high) @ weights) for knot in knots]
    shift = np.interp(mean, means, knots)
    return np.clip(wanted + shift, low, high)


def _rounded(wanted: Floats, sizes: Sequence[int], n: int) -> list[int]:
    """`wanted` rounded down, and up again by falling remainder while sum(kept * sizes) allows."""
    # An exact integer may have come out a rounding error below itself.
    kept = [math.floor(value + 1e-9) for value in wanted.tolist()]
    left = n * sum(sizes) - sum(each * size for each, size in zip(kept, sizes, strict=True))
    remainders = [value - each for value, each in zip(wanted.tolist(), kept, strict=True)]
    for i in sorted(range(len(kept)), key=lambda i: -remainders[i]):
        if remainders[i] > 1e-9 and sizes[i] <= left:
            kept[i] += 1
            left -= sizes[i]
    return kept
