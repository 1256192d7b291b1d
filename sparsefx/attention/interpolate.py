"""Values known at some row lengths, read at others."""

import torch
from torch import Tensor


def at_lengths(lengths: Tensor, table: Tensor, count: Tensor) -> Tensor:
    """table[h] at `count`, linear between `lengths`, constant beyond them.

    lengths int64 [points], ascending; table [heads, points]; count integer [..., heads, rows].
    Returns [..., heads, rows] in table's dtype.
    """
    upper = torch.searchsorted(lengths, count.contiguous()).clamp(1, max(lengths.shape[0] - 1, 1))
    upper = upper.clamp(max=lengths.shape[0] - 1)
    lower = (upper - 1).clamp(min=0)
    start, stop = lengths[lower], lengths[upper]
    share = (count - start).to(table.dtype) / (stop - start).clamp(min=1).to(table.dtype)
    share = share.clamp(0, 1)
    head = torch.arange(table.shape[0], device=table.device).view(-1, 1).expand(count.shape)
    first, second = table[head, lower], table[head, upper]
    return first + share * (second - first)
