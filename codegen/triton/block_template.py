"""Template of the block linear kernel: products of dense blocks of W, those that are stored.

A program has one row of blocks and a tile of x's rows, and walks the blocks of that row:

    y[tile, i] = sum over the blocks b of row i of x[tile, columns[b]] values[b]^T

Rows of blocks are handed out by falling number of blocks (`order`), so that the longest start
first and no multiprocessor is left with one at the end. A wide block is multiplied in CHUNK columns
at a time.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from sparsefx.codegen.triton.codes_part import nibble, numbers
from sparsefx.codegen.triton.finish_part import finish, reduce  # noqa: F401  # reduce: launched

CONSTANTS = {"BLOCK_OUT": 32, "BLOCK_IN": 32, "KIND": ""}


@triton.jit(do_not_specialize=["rows"])
def kernel(
    x,
    values,
    columns,
    row_ptr,
    order,
    scales,
    bias,
    extras,
    y,
    rows,
    out_features,
    in_features,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    KIND: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    GATED: tl.constexpr,
):
    """y [rows, out] = epilogue(x [rows, in] W^T) for one row of blocks and BLOCK_ROWS rows."""
    CHUNKS: tl.constexpr = BLOCK_IN // CHUNK
    number = tl.load(order + tl.program_id(0))
    part = tl.program_id(2)
    first = tl.load(row_ptr + number)
    last = tl.load(row_ptr + number + 1)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[None, :]
    x += tl.where(row < rows, row, 0).to(tl.int64) * in_features
    out = tl.arange(0, BLOCK_OUT)[:, None]
    inner = tl.arange(0, CHUNK)
    acc = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    for step in range(first * CHUNKS + part, last * CHUNKS, SPLIT):
        block = step // CHUNKS
        column = step % CHUNKS * CHUNK + inner
        at = block.to(tl.int64) * (BLOCK_OUT * BLOCK_IN) + (out * BLOCK_IN + column[None, :])
        if KIND == "":
            weight = tl.load(values + at)
        else:
            if KIND == "int4":
                codes = nibble(tl.load(values + at // 2), at % 2)
            else:
                codes = tl.load(values + at)
            weight = numbers(codes, tl.load(scales + block), KIND, x.dtype.element_ty)
        tile = tl.load(x + (tl.load(columns + block) * BLOCK_IN + column[:, None]))
        acc = tl.dot(weight, tile, acc, input_precision="ieee")
    finish(
        acc,
        bias,
        extras,
        y,
        part,
        number * BLOCK_OUT,
        tl.program_id(1) * BLOCK_ROWS,
        rows,
        out_features,
        BLOCK_OUT,
        BLOCK_ROWS,
        SPLIT,
        GATED,
    )
