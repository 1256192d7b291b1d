"""Template of the N:M linear kernel: decompress a tile of the weight in registers, then one dot.

W stays compressed in memory (`sparsefx.formats`). A step reads the values and index bytes of
GROUPS groups, places each value at its column by comparing the column with 0 .. GROUP - 1, and
multiplies the dense tile with x^T, so that a skinny x fills the narrow side of the tensor cores:

    dense[o, g, p] = sum over s of (values[o, g, s] if index[o, g, s] == p else 0)

At most one term of the sum is not zero, so it is taken on the bits, as integers, and is exact.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: C901

import triton
import triton.language as tl

from sparsefx.codegen.triton.codes_part import nibble, numbers
from sparsefx.codegen.triton.finish_part import finish, reduce  # noqa: F401  # reduce: launched

CONSTANTS = {"KEPT": 2, "SLOTS": 2, "GROUP": 4, "BITS": 2, "KIND": "", "SCALED": 0}


@triton.jit(do_not_specialize=["rows"])
def kernel(
    x,
    values,
    index,
    scales,
    bias,
    extras,
    y,
    rows,
    out_features,
    in_features,
    KEPT: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    KIND: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    EVEN: tl.constexpr,
    SPLIT: tl.constexpr,
    GATED: tl.constexpr,
):
    """y [rows, out] = epilogue(x [rows, in] W^T) for one tile of BLOCK_OUT x BLOCK_ROWS.

    SLOTS is KEPT rounded up to a power of two; EVEN says that BLOCK_IN divides in_features. SCALED
    columns, a multiple of BLOCK_IN, share a scale (0: the row does).
    """
    GROUPS: tl.constexpr = BLOCK_IN // GROUP
    FIELDS: tl.constexpr = GROUPS * SLOTS
    PER_BYTE: tl.constexpr = 8 // BITS
    kept = in_features // GROUP * KEPT
    index_bytes = (kept + PER_BYTE - 1) // PER_BYTE

    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[:, None]
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[None, :]
    out_inside = out < out_features
    row_inside = row < rows
    safe_out = tl.where(out_inside, out, 0).to(tl.int64)
    values += safe_out * ((kept + 1) // 2 if KIND == "int4" else kept)
    index += safe_out * index_bytes
    if KIND != "":
        scales += safe_out * ((in_features + SCALED - 1) // SCALED if SCALED > 0 else 1)
    x += tl.where(row_inside, row, 0).to(tl.int64) * in_features

    column = tl.arange(0, BLOCK_IN)[:, None]
    position = tl.arange(0, GROUP)[None, None, None, :]
    slot = tl.arange(0, FIELDS)[None, :]
    acc = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    part = tl.program_id(2)
    for start in range(part * BLOCK_IN, in_features, BLOCK_IN * SPLIT):
        first = start // GROUP * KEPT
        if (
            KEPT == SLOTS
        ):  # fields are contiguous: wide loads, one for the values, one for the index
            field = first + slot
            byte = first // PER_BYTE + tl.arange(0, FIELDS // PER_BYTE)[None, :]
            if EVEN:
                packed = tl.load(index + byte)
            else:
                packed = tl.load(index + byte, mask=byte < index_bytes, other=0)
            shift = (tl.arange(0, PER_BYTE) * BITS)[None, None, :]
            place = packed[:, :, None].to(tl.int32) >> shift
        else:  # a group's KEPT fields, then SLOTS - KEPT slots that hold nothing
            field = first + slot // SLOTS * KEPT + slot % SLOTS
            filled = (slot % SLOTS < KEPT) & (field < kept)
            packed = tl.load(index + field // PER_BYTE, mask=filled, other=0)
            place = packed.to(tl.int32) >> (field % PER_BYTE * BITS)
        at = field // 2 if KIND == "int4" else field
        if KEPT == SLOTS and EVEN:
            value = tl.load(values + at)
        elif KEPT == SLOTS:
            value = tl.load(values + at, mask=field < kept, other=0)
        else:
            value = tl.load(values + at, mask=filled, other=0)
        if KIND != "":
            if KIND == "int4":
                value = nibble(value, field % 2)
            scale = tl.load(scales + (start // SCALED if SCALED > 0 else 0))
            value = numbers(value, scale, KIND, x.dtype.element_ty)
        place = tl.reshape(place & ((1 << BITS) - 1), (BLOCK_OUT, GROUPS, SLOTS, 1))
        if value.dtype == tl.float32:
            word = value.to(tl.int32, bitcast=True)
        else:
            word = value.to(tl.int16, bitcast=True).to(tl.int32)
        word = tl.reshape(word, (BLOCK_OUT, GROUPS, SLOTS, 1))
        word = tl.sum(tl.where(place == position, word, 0), axis=2)
        word = tl.reshape(word, (BLOCK_OUT, BLOCK_IN))
        if value.dtype != tl.float32:
            word = word.to(tl.int16)
        dense = word.to(value.dtype, bitcast=True)
        if EVEN:
            tile = tl.load(x + start + column)
        else:
            tile = tl.load(x + start + column, mask=start + column < in_features, other=0.0)
        acc = tl.dot(dense, tile, acc, input_precision="ieee")

    first_out, first_row = tl.program_id(0) * BLOCK_OUT, tl.program_id(1) * BLOCK_ROWS
    finish(
        acc,
        bias,
        extras,
        y,
        part,
        first_out,
        first_row,
        rows,
        out_features,
        BLOCK_OUT,
        BLOCK_ROWS,
        SPLIT,
        GATED,
    )
