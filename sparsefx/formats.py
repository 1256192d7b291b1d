"""Dense <-> packed weights: N:M, bitmap and block; exact inverses of each other.

N:M   values [out, in*n/m] in the weight's dtype, in column order;
      index uint8 [out, in*n/m * bits/8]: the column of each value inside its group of m,
      `bits` = 2 for m = 4 and 4 for m = 8 and 16, lowest bits first. Groups with fewer than n
      nonzeros keep zeros at further columns, so that each group has exactly n entries and its
      columns ascend.
bitmap  values [nnz] in row order; bits uint8 [out, ceil(in/8)], lowest bit = lowest column;
        row_ptr int32 [out + 1]: row r owns values[row_ptr[r]:row_ptr[r + 1]].
block   values [blocks, r, c], the blocks that hold a nonzero, row of blocks by row of blocks;
        columns int32 [blocks]: the block column of each, ascending in a row of blocks;
        row_ptr int32 [out/r + 1]: block row i owns values[row_ptr[i]:row_ptr[i + 1]].

A kept value may itself be zero; `-0.0` counts as zero. Values may be codes of a quantised weight
(packing.py).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sparsefx.errors import ShapeMismatch

NM_GROUPS = (4, 8, 16)


class PackedNM(NamedTuple):
    """A weight stored as N:M."""

    values: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index; ".index" is the name on disk


class PackedBitmap(NamedTuple):
    """A weight stored as bitmap."""

    values: Tensor
    bits: Tensor
    row_ptr: Tensor


class PackedBlock(NamedTuple):
    """A weight stored as dense blocks."""

    values: Tensor
    columns: Tensor
    row_ptr: Tensor


def index_bits(m: int) -> int:
    """Bits of one column index of an N:M group: 2 for m = 4, 4 for m = 8 and 16."""
    return 2 if m == 4 else 4


def nm_count(weight: Tensor, m: int) -> int | None:
    """The smallest n for which `weight` [out, in] is n:m sparse; None if m does not divide in."""
    if weight.shape[1] % m:
        return None
    groups = (weight != 0).view(weight.shape[0], -1, m)
    return int(groups.sum(-1).max()) if groups.numel() else 0


def pack_nm(weight: Tensor, n: int, m: int) -> PackedNM:
    """Packs an n:m sparse `weight` [out, in].

    Raises ShapeMismatch if a group holds more than n nonzeros, m is not 4, 8 or 16, or a row's
    indices do not fill whole bytes.
    """
    _check_nm(weight.shape, n, m)
    found = nm_count(weight, m)
    if found is None or found > n:
        raise _wrong(
            "weight", weight.shape, f"a group of {m} holds {found} nonzeros, more than {n}"
        )
    kept = _exactly_n(weight.reshape(weight.shape[0], -1, m) != 0, n)
    values = weight.reshape(kept.shape)[kept].view(weight.shape[0], -1)
    columns = kept.nonzero()[:, 2].view(weight.shape[0], -1)
    index = pack_fields(columns.to(torch.uint8), index_bits(m))
    return PackedNM(values, index)


def unpack_nm(packed: PackedNM, n: int, m: int) -> Tensor:
    """The dense weight [out, in] of an N:M packing."""
    values, index = packed
    out, kept = values.shape
    columns = unpack_fields(index, index_bits(m), kept).long().view(out, -1, n)
    dense = values.new_zeros(out, kept // n, m)
    return dense.scatter_(-1, columns, values.view(out, -1, n)).view(out, -1)


def index_columns(index: Tensor, m: int) -> Tensor:
    """The columns stored in `PackedNM.index` [out, bytes], uint8 [out, bytes * 8 / index_bits(m)].

    Those behind the last value of a row are padding.
    """
    return unpack_fields(index, index_bits(m), index.shape[1] * 8 // index_bits(m))


def pack_bitmap(weight: Tensor) -> PackedBitmap:
    """Packs any `weight` [out, in] as bitmap."""
    if weight.dim() != 2:
        raise _wrong("weight", weight.shape, "a bitmap holds a matrix")
    keep = weight != 0
    return PackedBitmap(weight[keep], pack_bits(keep), offsets(keep.sum(1)))


def unpack_bitmap(packed: PackedBitmap, in_features: int) -> Tensor:
    """The dense weight [out, in_features] of a bitmap packing."""
    keep = unpack_bits(packed.bits, in_features)
    dense = packed.values.new_zeros(keep.shape)
    return dense.masked_scatter_(keep, packed.values)


def pack_block(weight: Tensor, rows: int, cols: int) -> PackedBlock:
    """Packs any `weight` [out, in] as blocks of `rows` x `cols`; bits inside a block are kept.

    Raises ShapeMismatch if it is no grid of such blocks.
    """
    if weight.dim() != 2 or min(rows, cols) < 1 or weight.shape[0] % rows or weight.shape[1] % cols:
        raise _wrong("weight", weight.shape, f"it is not a grid of {rows} x {cols} blocks")
    tiles = weight.reshape(weight.shape[0] // rows, rows, -1, cols).transpose(1, 2)
    keep = (tiles != 0).flatten(2).any(-1)
    columns = keep.nonzero()[:, 1].to(torch.int32)
    return PackedBlock(tiles[keep].contiguous(), columns, offsets(keep.sum(1)))


def unpack_block(packed: PackedBlock, in_features: int) -> Tensor:
    """The dense weight [out, in_features] of a block packing."""
    values, columns, row_ptr = packed
    rows, cols = values.shape[1:]
    tiles = values.new_zeros(len(row_ptr) - 1, in_features // cols, rows, cols)
    tiles[block_rows(row_ptr), columns.long()] = values
    return tiles.transpose(1, 2).reshape(-1, in_features).contiguous()


def block_rows(row_ptr: Tensor) -> Tensor:
    """The row of blocks of each stored block, int64 [blocks]."""
    numbers = torch.arange(len(row_ptr) - 1, device=row_ptr.device)
    return numbers.repeat_interleave(row_ptr.diff())


def offsets(counts: Tensor) -> Tensor:
    """int32 [k + 1]: where the entries of each of k rows start, from their counts [k]."""
    row_ptr = torch.zeros(len(counts) + 1, dtype=torch.int32, device=counts.device)
    row_ptr[1:] = counts.cumsum(0)
    return row_ptr


def pack_bits(keep: Tensor) -> Tensor:
    """Bool [out, in] as uint8 [out, ceil(in/8)], lowest bit = lowest column."""
    return pack_fields(keep.to(torch.uint8), 1)


def unpack_bits(bits: Tensor, in_features: int) -> Tensor:
    """Inverse of `pack_bits`."""
    return unpack_fields(bits, 1, in_features).bool()


def _exactly_n(keep: Tensor, n: int) -> Tensor:
    """bool [out, groups, m] with at most n True a group -> exactly n: the first zeros fill up.

    Counting zeros from the left is linear in the size; sorting each group took ten times as long.
    """
    missing = n - keep.sum(-1, keepdim=True, dtype=torch.int8)
    if not missing.any():
        return keep
    return keep | (~keep & ((~keep).cumsum(-1, dtype=torch.int8) <= missing))


def pack_fields(fields: Tensor, bits: int) -> Tensor:
    """uint8 [out, k] of `bits`-wide numbers, 8/bits to a byte, first lowest; padded by zeros."""
    per_byte = 8 // bits
    padding = -fields.shape[1] % per_byte
    if padding:
        fields = torch.nn.functional.pad(fields, (0, padding))
    shifts = torch.arange(per_byte, dtype=torch.uint8, device=fields.device) * bits
    lanes = fields.view(fields.shape[0], -1, per_byte) << shifts
    return lanes.sum(-1, dtype=torch.uint8).contiguous()


def unpack_fields(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_fields`: uint8 [out, count]."""
    shifts = torch.arange(8 // bits, dtype=torch.uint8, device=packed.device) * bits
    lanes: Tensor = (packed[..., None] >> shifts) & (2**bits - 1)  # torch says Any
    return lanes.flatten(1)[:, :count]


def _check_nm(shape: torch.Size, n: int, m: int) -> None:
    if m not in NM_GROUPS or not 0 < n < m:
        raise _wrong("weight", shape, f"{n}:{m} is not packable, m must be one of {NM_GROUPS}")
    if len(shape) != 2 or shape[1] % m:
        raise _wrong("weight", shape, f"its input features are not a multiple of m={m}")


def _wrong(name: str, shape: torch.Size, rule: str) -> ShapeMismatch:
    return ShapeMismatch(
        name=name, shape=tuple(shape), rule=rule, remedy="Leave this weight dense or as a bitmap"
    )
