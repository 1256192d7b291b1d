"""Global magnitude pruning with a minimum kept per layer (Gupta et al. 2022, arXiv 2209.14624).

    kept_l(tau) = max(least_l, count(|w| >= tau in layer l))      sum_l kept_l = K

tau is one number for all layers: the kept weights are those of largest summed |w| among all choices
of K that leave each layer its minimum. (The reference code scales the sparsities of the layers
above the minimum instead, which keeps their mean and not their threshold.) tau is found by counting
the bits of float32 |w|, whose order is that of the numbers, eleven at a time from the top: three
scans of the weights, no sort, and no copy of more than a chunk.
"""

from collections.abc import Iterator, Mapping
from math import ceil

import torch
from torch import Tensor

from sparsefx.errors import ImpossibleBudget
from sparsefx.prune.allocation.layers import check_sparsity, share_of

_DIGITS = ((20, 11), (10, 10), (0, 10))  # (lowest bit, bits) of |w|'s 31, from the top
_CHUNK = 1 << 22  # elements looked at in one go


def global_magnitude(
    weights: Mapping[str, Tensor], sparsity: float, min_keep: float = 0.0
) -> dict[str, float]:
    """Sparsity of each layer by name, such that int(sparsity * all) weights are zeroed in all.

    weights: of any shape and float dtype, finite; compared as float32, as `Magnitude` does.
    Every layer keeps at least min_keep times the number of all weights, or all that it has, and at
    least one. Equal weights at the threshold are kept in the earlier layers. A pattern that zeroes
    int(s * numel) weights of a layer at the returned s reaches the total exactly.

    Raises ImpossibleBudget if the minima alone exceed what may be kept, InvalidAllocation for a
    sparsity outside [0, 1).
    """
    check_sparsity(sparsity)
    sizes = torch.tensor([weight.numel() for weight in weights.values()], dtype=torch.int64)
    count = int(sizes.sum())
    keep = count - int(sparsity * count)
    least = sizes.clamp(max=max(1, ceil(min_keep * count)))
    if int(least.sum()) > keep:
        raise ImpossibleBudget(
            rule=f"the minimum of each layer adds up to {int(least.sum())} of {count} weights and "
            f"a sparsity of {sparsity:.4g} leaves {keep}",
            remedy="Ask for less sparsity, or pass a smaller min_keep",
        )
    kept = _kept(weights, least, keep)
    drops = (sizes - kept).tolist()
    return {
        name: share_of(drop, weight.numel()) if drop else 0.0
        for (name, weight), drop in zip(weights.items(), drops, strict=True)
    }


def _kept(weights: Mapping[str, Tensor], least: Tensor, keep: int) -> Tensor:
    """How many weights each layer keeps, int64 [layers], `keep` in all."""
    above = torch.zeros_like(least)  # weights of each layer above all that have the prefix
    prefix = 0
    for shift, width in _DIGITS:
        counts = _histograms(weights, prefix, shift, width)
        reaching = above[:, None] + counts.flip(1).cumsum(1).flip(1)  # at this digit or above
        enough = torch.maximum(reaching, least[:, None]).sum(0) >= keep
        digit = int(enough.nonzero().max())
        above = reaching[:, digit] - counts[:, digit]
        prefix = (prefix << width) | digit
    # Now the prefix is the threshold itself, and `reaching` counts it.
    without, with_ties = torch.maximum(above, least), torch.maximum(reaching[:, digit], least)
    ties = with_ties - without
    given = (keep - int(without.sum()) - (ties.cumsum(0) - ties)).clamp(min=0)
    return without + torch.minimum(ties, given)


def _histograms(weights: Mapping[str, Tensor], prefix: int, shift: int, width: int) -> Tensor:
    """How often each digit follows `prefix` in |w|'s bits, int64 [layers, 2 ** width]."""
    counts = torch.zeros(len(weights), 2**width, dtype=torch.int64)
    for row, weight in zip(counts, weights.values(), strict=True):
        for bits in _magnitude_bits(weight):
            digits = (bits >> shift) - (prefix << width)
            if prefix or shift + width < 31:
                digits = digits[(digits >= 0) & (digits < 2**width)]
            row += torch.bincount(digits, minlength=2**width).cpu()
    return counts


def _magnitude_bits(weight: Tensor) -> Iterator[Tensor]:
    """|w| as float32 read as whole numbers, in chunks, int32."""
    for chunk in weight.detach().flatten().split(_CHUNK):
        yield chunk.float().abs().view(torch.int32)
