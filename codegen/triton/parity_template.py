"""Template of the 2:4 linear kernel on parity slots: expand W by masks in registers, then one dot.

W lies in words of two values, each in the half where it ends up, and codes (parity_pack.py). A step
reads the words of a tile, splits each into the word of columns 0, 1 and that of columns 2, 3 of its
group, and multiplies the dense tile with x^T as in `nm_template`: without comparing an index, and
with integers that every device has.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from sparsefx.codegen.triton.finish_part import finish, reduce  # noqa: F401  # reduce: launched


@triton.jit
def expanded(words, codes, OUT: tl.constexpr, GROUPS: tl.constexpr):
    """16-bit integers [OUT, 4 GROUPS] of words [OUT, GROUPS] and codes [OUT, GROUPS / 8]."""
    group = tl.arange(0, 8)[None, None, :]
    field = tl.reshape(codes[:, :, None] >> (group + (group & 4)), (OUT, GROUPS))
    early = (field & 0x00010001) * 0xFFFF
    first = words & early
    rest = words ^ first
    distance = field & 16
    late = (rest << distance) | (rest >> (-distance & 31))
    pairs = tl.reshape(tl.join(first, late), (OUT, 2 * GROUPS))
    halves = tl.join(pairs.to(tl.uint16), (pairs >> 16).to(tl.uint16))
    return tl.reshape(halves, (OUT, 4 * GROUPS))


@triton.jit(do_not_specialize=["rows"])
def kernel(
    x,
    words,
    codes,
    scales,
    bias,
    extras,
    y,
    rows,
    out_features,
    in_features,
    PADDED: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    EVEN: tl.constexpr,
    SPLIT: tl.constexpr,
    GATED: tl.constexpr,
):
    """y [rows, out] = epilogue(x [rows, in] W^T) for one tile of BLOCK_OUT x BLOCK_ROWS.

    Rows of W are padded to a multiple of PADDED columns, which BLOCK_IN divides; EVEN says that it
    divides in_features, too. There are no scales.
    """
    GROUPS: tl.constexpr = BLOCK_IN // 4
    padded = (in_features + PADDED - 1) // PADDED * PADDED
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)[:, None]
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[None, :]
    safe_out = tl.where(out < out_features, out, 0).to(tl.int64)
    words += safe_out * (padded // 4) + tl.arange(0, GROUPS)[None, :]
    codes += safe_out * (padded // 32) + tl.arange(0, GROUPS // 8)[None, :]
    x += tl.where(row < rows, row, 0).to(tl.int64) * in_features

    column = tl.arange(0, BLOCK_IN)[:, None]
    acc = tl.zeros((BLOCK_OUT, BLOCK_ROWS), tl.float32)
    part = tl.program_id(2)
    for start in range(part * BLOCK_IN, in_features, BLOCK_IN * SPLIT):
        word = tl.load(words + start // 4).to(tl.uint32, bitcast=True)
        code = tl.load(codes + start // 32).to(tl.uint32, bitcast=True)
        dense = expanded(word, code, BLOCK_OUT, GROUPS).to(x.dtype.element_ty, bitcast=True)
        if EVEN:
            tile = tl.load(x + start + column)
        else:
            tile = tl.load(x + start + column, mask=start + column < in_features, other=0.0)
        acc = tl.dot(dense, tile, acc)

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
