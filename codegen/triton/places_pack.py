"""Weights by stored value: sixteen values of a row of W and their columns, nothing of the zeros.

A row of W is cut into vectors of up to VALUES stored values that lie within SPAN columns. A vector
holds the values (zeros fill it up), a byte each for how far behind its first one they lie, and the
column of that one as a base: 3.125 bytes a value of 16 bits. Vectors of a row follow each other.

The values of a vector may come in any order. A lane of a warp multiplies one after the other, and
eight neighbouring lanes, which have neighbouring vectors, read x at once: 16 bytes (8 rows) of a
column each, from different banks where their columns differ modulo CLASSES. So slot j of vector v
of a row takes a value whose column is v + j modulo CLASSES, as long as the vector has one.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sparsefx import formats
from sparsefx.formats import PackedBitmap

VALUES = 16  # of a vector
SPAN = 256  # columns that a vector may lie within
CLASSES = 8
MOST_COLUMNS = 1 << 16  # a base has 16 bits


class Places(NamedTuple):
    """A weight [out, in] as vectors.

    `values` and `places` (uint8: columns behind the base) are [vectors, VALUES], `bases` [vectors]
    int16, to be read as unsigned; row r has vectors from starts[r], int32 [out + 1], on.
    """

    values: Tensor
    places: Tensor
    bases: Tensor
    starts: Tensor


def pack(packed: PackedBitmap, in_features: int) -> Places:
    """The vectors of a bitmap."""
    stored, bits, row_ptr = packed
    row, column = formats.unpack_bits(bits, in_features).nonzero(as_tuple=True)
    is_first = _firsts(row * (in_features + SPAN) + column, row_ptr)
    vector = is_first.cumsum(0) - 1
    first = is_first.nonzero()[:, 0]
    slot = torch.arange(len(vector), device=vector.device) - first[vector]
    base, row = column[first], row[first]
    starts = formats.offsets(torch.bincount(row, minlength=len(row_ptr) - 1))
    places = base.new_zeros(len(first), VALUES)
    places[vector, slot] = column - base[vector]
    values = stored.new_zeros(places.shape)
    values[vector, slot] = stored
    lane = torch.arange(len(first), device=row.device) - starts[row]
    slots = _slots((base[:, None] + places - lane[:, None]) % CLASSES)
    return Places(
        torch.zeros_like(values).scatter(1, slots, values),
        torch.zeros_like(places).scatter(1, slots, places).to(torch.uint8),
        base.to(torch.int32).to(torch.int16),
        starts,
    )


def unpack(stored: Places, in_features: int) -> Tensor:
    """Inverse of `pack`: the dense weight [out, in_features]."""
    values, places, bases, starts = stored
    columns = (bases.long() & 0xFFFF)[:, None] + places
    rows = formats.block_rows(starts)[:, None].expand(columns.shape)
    dense = values.new_zeros(len(starts) - 1, in_features)
    return dense.index_put_((rows, columns), values, accumulate=True)  # what fills up is 0


def fill(density: float) -> float:
    """About how many values a vector holds where that share of the weights is stored."""
    return min(VALUES, 1 + (SPAN - 1) * density)


def _firsts(key: Tensor, row_ptr: Tensor) -> Tensor:
    """Bool: which of the ascending keys begin a vector; row r has those from row_ptr[r] on.

    A vector ends where it is full or where the next key is SPAN away, as the next row's is.
    """
    following = torch.arange(VALUES, VALUES + len(key), device=key.device)
    far = torch.cat((key, key[:0].new_full((VALUES,), 1 << 62)))[VALUES:] >= key + SPAN
    following[far] = torch.searchsorted(key, key[far] + SPAN)
    is_first = torch.zeros_like(key, dtype=torch.bool)
    at, end = row_ptr[:-1].long(), row_ptr[1:].long()
    while (live := at < end).any():
        at, end = at[live], end[live]
        is_first[at] = True
        at = following[at]
    return is_first


def _slots(classes: Tensor) -> Tensor:
    """A permutation for each vector: its values of class k to slots k and k + CLASSES, others where
    there is room.
    """
    slot = torch.arange(VALUES, device=classes.device)
    among = (classes[:, :, None] == slot[:CLASSES]).to(torch.int8).cumsum(1, dtype=torch.int8)
    rank = among.gather(2, classes[:, :, None])[..., 0].long() - 1
    fits = rank < VALUES // CLASSES
    slots = torch.where(fits, classes + CLASSES * rank, 0)
    taken = torch.zeros_like(slots).scatter_add(1, slots, fits.long())
    late = fits.to(torch.int8).argsort(dim=1, stable=True)  # those that do not fit come first
    free = taken.argsort(dim=1, stable=True)
    kept = slots.gather(1, late)
    return slots.scatter(1, late, torch.where(slot < (~fits).sum(1, keepdim=True), free, kept))
