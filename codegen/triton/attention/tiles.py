"""From a map of kept tiles to the lists that the block_attention kernel walks."""

import torch
from torch import Tensor


def lists(
    keep: Tensor,
    queries: int,
    keys: int,
    is_causal: bool,
    window: int,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor]:
    """The key tiles that each row tile visits, and how many.

    keep: bool [.., row tiles, key tiles]. Returns tiles, int32 [.., row tiles, key tiles]: first
    the kept tiles that every row sees whole, ascending, then the other kept tiles of which a row
    sees a part, ascending, then nothing that is read; and counts, int32 [.., row tiles, 2]: of the
    first kind, and of both.
    """
    seen, whole = coverage(keep, queries, keys, is_causal, window, block_q, block_k)
    free, edge = keep & whole, keep & seen & ~whole
    frees, both = free.sum(-1, keepdim=True), (keep & seen).sum(-1, keepdim=True)
    slot = torch.where(free, free.cumsum(-1), frees + edge.cumsum(-1)) - 1
    last = keep.shape[-1]
    slot = slot.masked_fill(~(free | edge), last)  # one more slot takes what is dropped
    tile = torch.arange(last, dtype=torch.int32, device=keep.device).expand(keep.shape)
    listed = tile.new_zeros((*keep.shape[:-1], last + 1)).scatter_(-1, slot, tile)
    return listed[..., :last].contiguous(), torch.cat((frees, both), -1).int()


def coverage(
    keep: Tensor,
    queries: int,
    keys: int,
    is_causal: bool,
    window: int,
    block_q: int,
    block_k: int,
) -> tuple[Tensor, Tensor]:
    """Bool [row tiles, key tiles] each: some row sees a part of it; each row sees all of it."""
    row = torch.arange(keep.shape[-2], device=keep.device)[:, None] * block_q
    start = torch.arange(keep.shape[-1], device=keep.device)[None, :] * block_k
    stop = start + block_k
    first = row + (keys - queries)  # positions of the first row, and behind the last one
    behind = (row + block_q).clamp(max=queries) + (keys - queries)
    seen, whole = (row < queries) & (start < keys), (row < queries) & (stop <= keys)
    if is_causal:
        seen, whole = seen & (start < behind), whole & (stop <= first + 1)
    if window:
        seen, whole = seen & (stop > first - window + 1), whole & (start >= behind - window)
    return seen, whole
