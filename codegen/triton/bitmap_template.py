"""Template of the bitmap linear kernel: find each weight's rank in its row, load it, then one dot.

W stays compressed in memory (`sparsefx.formats`). Bit c of a row says whether column c is stored,
and the value of column c lies at the row's start plus the number of set bits before c:

    rank(c) = start[part, o] + ones before this step + ones before c's byte + ones below c in it

The first two are carried along the part of the row, the third is a prefix sum over the bytes of the
step.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from sparsefx.codegen.triton.codes_part import nibble, numbers
from sparsefx.codegen.triton.finish_part import finish, reduce  # noqa: F401  # reduce: launched


@triton.jit
def ones(byte):
    """Number of set bits of each byte (int32, 0 .. 255)."""
    pairs = byte - ((byte >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return (nibbles + (nibbles >> 4)) & 0x0F


@triton.jit(do_not_specialize=["rows"])
def kernel(
    x,
    values,
    bits,
    starts,
    scales,
    bias,
    extras,
    y,
    rows,
    out_features,
    in_features,
    KIND: tl.constexpr,
    SCALED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    EVEN: tl.constexpr,
    SPLIT: tl.constexpr,
    GATED: tl.constexpr,
):
    """y [rows, out] = epilogue(x [rows, in] W^T) for one tile of BLOCK_OUT x BLOCK_ROWS.

    EVEN says that BLOCK_IN divides in_features. A part has CHUNK columns, of which SCALED, a
    multiple of BLOCK_IN, share a scale (0: the row does).
    """
    BYTES: tl.constexpr = BLOCK_IN // 8
    row_bytes = (in_features + 7) // 8

    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[:, None]
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[None, :]
    out_inside = out < out_features
    row_inside = row < rows
    safe_out = tl.where(out_inside, out, 0)
    bits += safe_out.to(tl.int64) * row_bytes
    x += tl.where(row_inside, row, 0).to(tl.int64) * in_features
    part = tl.program_id(2)
    rank = tl.load(starts + part * out_features + safe_out)
    if KIND != "":
        scales += safe_out * ((in_features + SCALED - 1) // SCALED if SCALED > 0 else 1)

    column = tl.arange(0, BLOCK_IN)[:, None]
    lane = tl.arange(0, BYTES)[None, :]
    bit = tl.arange(0, 8)[None, None, :]
    acc = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    for start in range(part * CHUNK, tl.minimum((part + 1) * CHUNK, in_features), BLOCK_IN):
        at_byte = start // 8 + lane
        if EVEN:
            byte = tl.load(bits + at_byte).to(tl.int32)
        else:
            byte = tl.load(bits + at_byte, mask=at_byte < row_bytes, other=0).to(tl.int32)
        count = ones(byte)
        before = rank + tl.cumsum(count, 1) - count
        below = ones(byte[:, :, None] & ((1 << bit) - 1))
        keep = ((byte[:, :, None] >> bit) & 1) != 0
        at = before[:, :, None] + below
        if KIND == "int4":
            codes = nibble(tl.load(values + at // 2, mask=keep, other=0), at % 2)
            dense = tl.where(keep, codes, 0)
        else:
            dense = tl.load(values + at, mask=keep, other=0)
        rank += tl.sum(count, 1, keep_dims=True)
        dense = tl.reshape(dense, (BLOCK_OUT, BLOCK_IN))
        if KIND != "":
            scale = tl.load(scales + (start // SCALED if SCALED > 0 else 0))
            dense = numbers(dense, scale, KIND, x.dtype.element_ty)
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
