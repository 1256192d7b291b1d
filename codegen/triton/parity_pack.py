"""2:4 weights of 16 bits whose values lie in the half word of their column's parity; exact inverse.

A group of four columns is a word. Its columns 0, 1 and its columns 2, 3 are to become two words of
two values; parity says which half of either a value takes. A value is stored in that half, so that
a mask takes it to its place. Where both values want the same half, the second lies in the other
one and is rotated by 16 bits. Eight groups share a code word; from bit o = j + (j & 4) on, group j:

    bit o       the lower half belongs to columns 0, 1
    bit o + 16  the upper half does
    bit o + 4   the rest is rotated: behind a shift by o this is 16, the distance
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

COLUMNS = 128  # rows of W are padded to a multiple; columns of the widest step
_FIRST, _SECOND, _ROTATED = 1, 1 << 16, 16


def pack(values: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Words [out, groups] and codes [out, groups / 8], both int32, with zeros up to COLUMNS.

    `values` (16 bits) and `columns` (int64, ascending) are [out, in / 4, 2].
    """
    bits = values.contiguous().view(torch.int16).long() & 0xFFFF
    halves = columns & 1
    rotated = halves[..., 0] == halves[..., 1]
    lies = torch.stack(
        (halves[..., 0], torch.where(rotated, 1 - halves[..., 0], halves[..., 1])), -1
    )
    words = (bits << (lies * 16)).sum(-1)
    early = torch.where(columns < 2, torch.where(lies == 0, _FIRST, _SECOND), 0).sum(-1)
    fields = early + rotated * _ROTATED
    extra = (0, -words.shape[1] % (COLUMNS // 4))
    words, fields = pad(words, extra), pad(fields, extra)
    codes = (fields.unflatten(1, (-1, 8)) << _offsets(words.device)).sum(-1)
    return _int32(words), _int32(codes)


def unpack(words: Tensor, codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of `pack`: the dense weight [out, groups * 4] in `dtype`."""
    fields = (codes.long()[..., None] >> _offsets(words.device)).flatten(1)
    early = ((fields & _FIRST) + (fields & _SECOND)) * 0xFFFF
    word = words.long() & 0xFFFFFFFF
    first, rest = word & early, word & ~early
    rotated = (rest << 16 | rest >> 16) & 0xFFFFFFFF
    second = torch.where(fields & _ROTATED > 0, rotated, rest)
    pairs = _int32(torch.stack((first, second), -1))
    return pairs.flatten(1).contiguous().view(dtype)


def _offsets(device: torch.device) -> Tensor:
    group = torch.arange(8, device=device)
    return group + (group & 4)


def _int32(bits: Tensor) -> Tensor:
    """The lower 32 bits of int64 numbers in [0, 2^32)."""
    return torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32)
