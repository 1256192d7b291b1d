"""Scales of quantised weights in the order in which the lanes of a warp need them."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsefx.codegen.triton.mma_sp_asm import COLUMNS, SCALES
from sparsefx.codegen.triton.mma_sp_pack import ROWS


def words(scales: Tensor, group: int, tiles: int, blocks: int) -> Tensor:
    """scales [out, groups] of 16 bits as int32 [tiles, blocks, 8, SCALES].

    Word w of (tile, block, g) holds the scales of rows g and g + 8 of the tile in its halves, for
    columns 64 w .. of the block; columns that share a scale hold it each.
    """
    count = blocks * SCALES
    spread = scales.repeat_interleave(group * SCALES // COLUMNS if group else count, 1)[:, :count]
    missing = (0, count - spread.shape[1], 0, tiles * ROWS - scales.shape[0])
    split = pad(spread, missing).view(tiles, 2, 8, blocks, SCALES).permute(0, 3, 2, 4, 1)
    return split.contiguous().view(torch.int16).view(torch.int32)[..., 0]


def from_words(stored: Tensor, dtype: torch.dtype, in_features: int) -> Tensor:
    """Inverse of `words`, a factor for each weight: float32 [16 tiles, in_features]."""
    halves = stored[..., None].view(torch.int16).view(dtype)  # tile, block, g, word, half
    scales = halves.permute(0, 4, 2, 1, 3).reshape(stored.shape[0] * ROWS, -1)
    return scales.repeat_interleave(COLUMNS // SCALES, 1)[:, :in_features].float()
