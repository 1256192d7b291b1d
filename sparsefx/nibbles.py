"""int4 codes in -7..7, two a byte: low nibble first, two's complement, rows at whole bytes."""

import torch
from torch import Tensor

from sparsefx.formats import PackedBitmap, offsets, pack_fields, unpack_bits, unpack_fields

_LOW = 15


def pack_nibbles(codes: Tensor) -> Tensor:
    """int8 [..., k] as uint8 [..., ceil(k/2)]; the spare nibble is 0."""
    if not codes.numel():
        return torch.zeros(half(codes.shape), dtype=torch.uint8, device=codes.device)
    nibbles = (codes & _LOW).to(torch.uint8).reshape(-1, codes.shape[-1])
    return pack_fields(nibbles, 4).view(half(codes.shape))


def unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """Inverse of `pack_nibbles`: int8 [..., count]."""
    if not packed.numel():
        return torch.zeros((*packed.shape[:-1], count), dtype=torch.int8, device=packed.device)
    nibbles = unpack_fields(packed.reshape(-1, packed.shape[-1]), 4, count)
    signed = nibbles.to(torch.int8).bitwise_xor(8).sub_(8)
    return signed.reshape(*packed.shape[:-1], count)


def half(shape: torch.Size) -> torch.Size:
    """The shape of the bytes that hold nibbles of `shape`."""
    return torch.Size((*shape[:-1], -(-shape[-1] // 2)))


def narrow_bitmap(packed: PackedBitmap) -> PackedBitmap:
    """A bitmap of int8 codes with nibbles as values.

    row_ptr then counts each row's codes and one more where that is odd, so that byte
    row_ptr[r] / 2 starts row r.
    """
    counts = packed.row_ptr.diff()
    row_ptr = offsets(counts + counts % 2)
    codes = packed.values.new_zeros(int(row_ptr[-1]))
    codes[_places(row_ptr, counts)] = packed.values
    return PackedBitmap(pack_nibbles(codes), packed.bits, row_ptr)


def widen_bitmap(packed: PackedBitmap, in_features: int) -> PackedBitmap:
    """Inverse of `narrow_bitmap`."""
    counts = unpack_bits(packed.bits, in_features).sum(1)
    codes = unpack_nibbles(packed.values, 2 * len(packed.values))
    return PackedBitmap(codes[_places(packed.row_ptr, counts)], packed.bits, offsets(counts))


def _places(row_ptr: Tensor, counts: Tensor) -> Tensor:
    """Where each code of the rows lies among those of rows that are padded, int64 [codes]."""
    gaps = row_ptr[:-1] - offsets(counts)[:-1]
    return torch.arange(int(counts.sum()), device=counts.device) + gaps.repeat_interleave(counts)
