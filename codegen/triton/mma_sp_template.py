"""Template of the 2:4 and 1:4 kernel on sparse tensor cores: mma.sp by inline PTX (sm_80 and up).

W lies in memory in fragment order (mma_sp_pack.py), so that every load is 128 bits of what the lane
itself needs: nothing goes through shared memory and nothing is expanded. The last dimension of a
tensor is 128 words of each warp, four neighbours a lane; loads of 128 bits make Triton lay it out
in just that way, which the ahead-of-time tests assert. A warp computes SLABS x TILES accumulators,
each 16 rows of W by 8 rows of x. Of the warps of a program, TALL work on different rows of W and
DEEP on different columns; the latter are added up at the end.

x is read as it is, and neighbouring lanes exchange words (DIRECT), or `fragments_of` writes it in
fragment order first: many tiles of x would be exchanged again for every 16 rows of W.
"""

# mypy: disable-error-code="no-untyped-def, assignment, var-annotated"
# ruff: noqa: RUF005, C901  # Triton unpacks no tuples

import triton
import triton.language as tl

from sparsefx.codegen.triton.finish_part import finish, reduce  # noqa: F401  # reduce: launched
from sparsefx.codegen.triton.mma_sp_part import (
    EXCHANGE,
    EXCHANGE_OPERANDS,
    MULTIPLY,
    MULTIPLY_OPERANDS,
)


@triton.jit
def row_words(x, row, rows, in_words, column):
    """Addresses of 16 neighbouring bytes of a row of x; rows behind the last read the first."""
    at = tl.where(row < rows, row, 0).to(tl.int64) * in_words + column
    return x + tl.max_contiguous(tl.multiple_of(at, (1, 4)), (1, 4))


@triton.jit
def exchanged(words):
    """Four registers of the B operand of one step, from 16 bytes of a row of x for each lane."""
    return tl.inline_asm_elementwise(
        EXCHANGE, EXCHANGE_OPERANDS, [words], dtype=tl.int32, is_pure=True, pack=4
    )


@triton.jit
def multiplied(operands):
    """The last operand plus the product of one block of W with 8 rows of x, for each slab."""
    return tl.inline_asm_elementwise(
        MULTIPLY, MULTIPLY_OPERANDS, operands, dtype=tl.float32, is_pure=True, pack=4
    )


@triton.jit(do_not_specialize=["rows"])
def fragments_of(x, y, rows, in_words, STEPS: tl.constexpr, TILES: tl.constexpr):
    """y [group of row tiles, block, tile, step, 32 lanes, 4]: x in fragment order, a tile of it."""
    word = tl.arange(0, 128)[None, :]
    step = tl.arange(0, STEPS)[:, None]
    column = (tl.program_id(0) * STEPS + step) * 16 + word % 16
    row = tl.program_id(1) * 8 + word // 16
    words = tl.load(row_words(x, row, rows, in_words, column), mask=column < in_words, other=0)
    group, tile = tl.program_id(1) // TILES, tl.program_id(1) % TILES
    at = (group * tl.num_programs(0) + tl.program_id(0)) * TILES + tile
    tl.store(y + at * (128 * STEPS) + 128 * step + word, exchanged(words))


@triton.jit(do_not_specialize=["rows"])
def kernel(
    x,
    fragments,
    metadata,
    scales,
    bias,
    extras,
    y,
    rows,
    out_features,
    in_words,
    blocks,
    LOADS: tl.constexpr,
    SCALED: tl.constexpr,
    SLABS: tl.constexpr,
    TILES: tl.constexpr,
    TALL: tl.constexpr,
    DEEP: tl.constexpr,
    DIRECT: tl.constexpr,
    EVEN: tl.constexpr,
    SPLIT: tl.constexpr,
    GATED: tl.constexpr,
):
    """y = epilogue(x W^T) for 16 SLABS TALL rows of W and 8 TILES rows of x.

    A block has LOADS 128-bit loads of A, one of metadata, and one of scales if SCALED.
    EVEN: DEEP SPLIT divides the blocks, and whole blocks in_features.
    """
    STEPS: tl.constexpr = 8
    STRIDE: tl.constexpr = DEEP * SPLIT
    thread = tl.arange(0, 128 * TALL * DEEP)[None, :]
    word = thread % 128
    strip = tl.program_id(0) * TALL + thread // 128 % TALL
    strip = strip * SLABS + tl.arange(0, SLABS)[:, None]
    block = tl.program_id(2) * DEEP + thread // 128 // TALL
    column = block * 128 + word % 16
    first_row = tl.program_id(1) * (8 * TILES)

    at = strip.to(tl.int64) * blocks + block
    fragments += at * (128 * LOADS) + word
    metadata += at * 128 + word
    if SCALED:  # four words for each four lanes
        shared = at * 32 + (word // 16 * 4 + word % 4)
        scales += tl.max_contiguous(tl.multiple_of(shared, (1, 4)), (1, 4))

    # one sum and one address for each tile of x: only one tile's operands need registers at a time
    sums = ()
    batch = ()
    for tile in tl.static_range(TILES):
        sums = sums + (tl.zeros((SLABS, 128 * TALL * DEEP), tl.float32),)
        if DIRECT:
            row = first_row + 8 * tile + word // 16
            batch = batch + (row_words(x, row, rows, in_words, column),)
        else:
            at = ((tl.program_id(1) * blocks + block) * TILES + tile) * (128 * STEPS)
            batch = batch + (x + at + word,)
    SKIP: tl.constexpr = 16 if DIRECT else 128
    for start in range(0, blocks, STRIDE):
        inside = start + block < blocks
        if EVEN:
            weight = (tl.load(metadata),)
        else:  # columns 0 and 1, which are in order
            weight = (tl.load(metadata, mask=inside, other=0x44444444),)
        for load in tl.static_range(LOADS):
            if EVEN:
                weight = weight + (tl.load(fragments + 128 * load),)
            else:
                weight = weight + (tl.load(fragments + 128 * load, mask=inside, other=0),)
        factors = ()
        if SCALED:
            factors = (tl.load(scales) if EVEN else tl.load(scales, mask=inside, other=0),)
            scales += 32 * STRIDE
        added = ()
        for tile in tl.static_range(TILES):
            operands = weight
            # a block of x has 16 words a row and step, or 128 words a tile and step
            words = batch[tile] + start * (16 * STEPS if DIRECT else 128 * STEPS * TILES)
            for step in tl.static_range(STEPS):
                if EVEN:
                    part = tl.load(words + SKIP * step)
                elif DIRECT:
                    rest = column + (start * 128 + 16 * step) < in_words
                    part = tl.load(words + SKIP * step, mask=rest, other=0)
                else:
                    part = tl.load(words + SKIP * step, mask=inside, other=0)
                if DIRECT:
                    part = exchanged(part)
                operands = operands + (part,)
            added = added + (multiplied(operands + factors + (sums[tile],)),)
        sums = added
        fragments += 128 * LOADS * STRIDE
        metadata += 128 * STRIDE

    OUT: tl.constexpr = TALL * SLABS * 16
    for tile in tl.static_range(TILES):
        acc = sums[tile]
        if DEEP > 1:
            acc = tl.sum(tl.reshape(acc, (SLABS, DEEP, 128 * TALL)), 1)
        # lane 4 g + q, register 2 h + l: row g + 8 h of W, row 2 q + l of x
        acc = tl.permute(tl.reshape(acc, (SLABS, TALL, 8, 4, 2, 2)), (1, 0, 4, 2, 3, 5))
        finish(
            tl.reshape(acc, (OUT, 8)),
            bias,
            extras,
            y,
            tl.program_id(2),
            tl.program_id(0) * OUT,
            first_row + 8 * tile,
            rows,
            out_features,
            OUT,
            8,
            SPLIT,
            GATED,
        )
