"""N:M weights in the order in which the lanes of a warp need them for mma.sp; exact inverses.

W is cut into tiles of 16 rows and blocks of 256 columns (padded by zeros), a block into 8 steps of
32 columns, 8 groups of 4. Lane 4 g + q of a warp holds rows g and g + 8 of a tile. The columns of a
step may come in any order, as long as x comes in the same one and a group stays a group; this one
lets a lane read 16 neighbouring bytes of a row of x. With group = 4 p + 2 h + l:

    2:4   lane 4 g + 2 l + p, register 2 h + r: the values of row g + 8 r in that group
    1:4   lane 4 g + 2 l + p, register r: the values of two groups, h = 0 and 1, in its halves

The metadata of a step lie in two lanes of each four: in lanes 0, 1 for even steps (selector 0), in
lanes 2, 3 for odd ones; nibble q + 4 r of the first (second) of them is that of the group whose
values lie in register r (2 + r) of lane q.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparsefx.codegen.triton.mma_sp_asm import CODE_WORDS, COLUMNS, STEPS

ROWS = 16  # of a tile
_BIAS = {"int8": 128, "int4": 8}


class Groups(NamedTuple):
    """An n:4 weight: `values` and `columns` (int64, ascending), both [out, in / 4, n]."""

    values: Tensor
    columns: Tensor


def padded(groups: Groups, rows: int) -> Groups:
    """The same weight with zeros behind it: rows a multiple of `rows`, columns of a block's."""
    out, count, kept = groups.values.shape
    extra = (0, 0, 0, -count % (COLUMNS // 4), 0, -out % rows)
    columns = pad(groups.columns, extra)
    columns[:, count:] = columns[out:] = torch.arange(kept, device=columns.device)
    return Groups(pad(groups.values, extra), columns)


def fragments(groups: Groups, values: str) -> Tensor:
    """The values as int32 [tiles, blocks, loads, 32 lanes, 4 registers].

    `groups` is padded; `values` is "" (16-bit values), "int8" or "int4" (int8 codes; 2:4 only).
    """
    kept = groups.values.shape[-1]
    if kept == 1:
        pairs = _lanes(groups.values[..., 0]).view(torch.int16)  # t b s lane h r
        words = pairs.transpose(-1, -2).contiguous().view(torch.int32)[..., 0]
        return _loads(words)
    items = _lanes(groups.values)  # t b s lane h r slot
    if not values:
        return _loads(items.contiguous().view(torch.int16).view(torch.int32).flatten(4))
    codes = items.to(torch.int16) + _BIAS[values]
    if values == "int8":
        return _loads(codes.to(torch.uint8).flatten(5).contiguous().view(torch.int32)[..., 0])
    nibbles = codes.flatten(4, 5).transpose(-1, -2).flatten(4).long()  # slot, then register
    return _loads(_word(nibbles, torch.arange(8, device=codes.device) * 4)[..., None])


def unfragment(words: Tensor, kept: int, values: str, dtype: torch.dtype) -> Tensor:
    """Inverse of `fragments`: values [out, groups, kept] in `dtype`, codes in int8."""
    size = 2 if kept == 1 else CODE_WORDS[values]
    tiles, blocks = words.shape[:2]
    lanes = words.view(tiles, blocks, -1, 32, 4 // size, size).transpose(3, 4)
    lanes = lanes.reshape(tiles, blocks, STEPS, 32, size).contiguous()
    if kept == 1:
        pairs = lanes.view(torch.int16).unflatten(-1, (2, 2)).transpose(-1, -2)
        return _natural(pairs.contiguous().view(dtype))[..., None]
    if not values:
        return _natural(lanes.view(dtype).unflatten(-1, (2, 2, 2)))
    if values == "int8":
        codes = lanes.view(torch.uint8).unflatten(-1, (2, 2, 2)).to(torch.int16)
    else:
        nibbles = (lanes >> (torch.arange(8, device=words.device) * 4)) & 15
        codes = nibbles.unflatten(-1, (2, 4)).transpose(-1, -2).unflatten(-2, (2, 2))
    return _natural((codes - _BIAS[values]).to(torch.int8))


def metadata(columns: Tensor) -> Tensor:
    """2:4: int32 [tiles, blocks, 32 lanes, 4]; word i of a lane holds steps 2 i and 2 i + 1."""
    nibbles = _lanes(columns[..., 0] | columns[..., 1] << 2)  # t b s lane h r
    nibbles = nibbles.unflatten(3, (8, 4)).permute(0, 1, 2, 3, 5, 6, 4).flatten(5)  # .. g h (r q)
    words = _word(nibbles, torch.arange(8, device=columns.device) * 4)  # t b s g h
    words = words.unflatten(2, (4, 2)).permute(0, 1, 4, 3, 5, 2)  # t b g selector h i
    stored: Tensor = words.reshape(*words.shape[:2], 32, 4)
    return stored.contiguous()


def unmetadata(words: Tensor) -> Tensor:
    """Inverse of `metadata`: columns [out, groups, 2]."""
    steps = words.unflatten(2, (8, 2, 2)).permute(0, 1, 5, 3, 2, 4).flatten(2, 3)  # t b s g h
    nibbles: Tensor = (steps[..., None] >> (torch.arange(8, device=words.device) * 4)) & 15
    lanes = nibbles.unflatten(-1, (2, 4)).permute(0, 1, 2, 3, 6, 4, 5)  # t b s g q h r
    code = _natural(lanes.flatten(3, 4)).long()
    return torch.stack((code & 3, code >> 2), -1)


def single_metadata(columns: Tensor) -> Tensor:
    """1:4: int32 [tiles, blocks, 32 lanes, 4]: two words of columns, one of halves, and 0.

    Halves: bit 16 r + 8 h + 7 - s is set if the value is of columns 2 or 3. Columns: the lower bit
    of the column, of steps 4 w + 2 i + selector in word w, at bit 16 r + 4 q + 2 h + i; lanes
    2 selector and 2 selector + 1 of each four hold the same.
    """
    device = columns.device
    lanes = _lanes(columns[..., 0])  # t b s lane h r
    halves = (lanes >> 1).permute(0, 1, 3, 5, 4, 2).flatten(3)  # t b lane (r h s)
    masks = _word(halves, _half_shifts().to(device))
    lower = (lanes & 1).unflatten(3, (8, 4)).unflatten(2, (2, 2, 2))  # t b w i selector g q h r
    lower = lower.permute(0, 1, 5, 4, 2, 3, 6, 7, 8).flatten(5)  # t b g selector w (i q h r)
    words = _word(lower, _column_shifts().to(device)).repeat_interleave(2, 3).flatten(2, 3)
    return torch.cat((words, masks[..., None], torch.zeros_like(masks)[..., None]), -1)


def unsingle_metadata(stored: Tensor) -> Tensor:
    """Inverse of `single_metadata`: columns [out, groups, 1]."""
    halves = (stored[..., 2, None] >> _half_shifts().to(stored.device)) & 1
    upper = halves.unflatten(-1, (2, 2, STEPS)).permute(0, 1, 5, 2, 4, 3)  # t b s lane h r
    words = stored[:, :, ::2, :2].unflatten(2, (8, 2))  # t b g selector w
    lower = (words[..., None] >> _column_shifts().to(stored.device)) & 1
    lower = lower.unflatten(-1, (2, 4, 2, 2)).permute(0, 1, 4, 5, 3, 2, 6, 7, 8)
    return _natural(upper * 2 + lower.flatten(5, 6).flatten(2, 4)).long()[..., None]


def _half_shifts() -> Tensor:
    r, h, s = torch.meshgrid(*map(torch.arange, (2, 2, STEPS)), indexing="ij")
    return (16 * r + 8 * h + 7 - s).flatten()


def _column_shifts() -> Tensor:
    i, q, h, r = torch.meshgrid(*map(torch.arange, (2, 4, 2, 2)), indexing="ij")
    return (16 * r + 4 * q + 2 * h + i).flatten()


def _lanes(items: Tensor) -> Tensor:
    """[out, groups, ..] -> [tile, block, step, lane (g l p), h, r, ..]."""
    rest = items.shape[2:]
    tiles, blocks = items.shape[0] // ROWS, items.shape[1] * 4 // COLUMNS
    split = items.reshape(tiles, 2, 8, blocks, STEPS, 2, 2, 2, *rest)  # t r g b s p h l
    order = (0, 3, 4, 2, 7, 5, 6, 1, *range(8, split.dim()))
    return split.permute(order).reshape(tiles, blocks, STEPS, 32, 2, 2, *rest)


def _natural(lanes: Tensor) -> Tensor:
    """Inverse of `_lanes`."""
    rest = lanes.shape[6:]
    tiles, blocks = lanes.shape[:2]
    split = lanes.reshape(tiles, blocks, STEPS, 8, 2, 2, 2, 2, *rest)  # t b s g l p h r
    order = (0, 7, 3, 1, 2, 5, 6, 4, *range(8, split.dim()))
    return split.permute(order).reshape(tiles * ROWS, blocks * COLUMNS // 4, *rest)


def _loads(words: Tensor) -> Tensor:
    """[tile, block, step, lane, words] -> [tile, block, load, lane, 4]: 4 / words steps a load."""
    tiles, blocks, _, _, size = words.shape
    steps = words.view(tiles, blocks, -1, 4 // size, 32, size).transpose(3, 4)
    return steps.reshape(tiles, blocks, -1, 32, 4).contiguous()


def _word(fields: Tensor, shifts: Tensor) -> Tensor:
    """Sum of int fields << shifts over the last dimension, as the bits of an int32."""
    total = (fields.long() << shifts).sum(-1)
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)
