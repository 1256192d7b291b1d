"""Template of skip-softmax decode: one query a row, the keys split over programs, four launches.

scores reads K once and stores, for each query head, the largest score of each tile and how deep
below it every score lies. select meets the tiles of a row in the visiting order, as one program, so
that the running maxima are those of the definition however the keys are split; it lists the kept
tiles of each KV head. values shares that list out evenly and reads V for kept tiles only: its loop
has no branch, so its loads are pipelined. combine adds what the programs of a row have.

With the row's largest kept score M known before V is read, no program rescales anything:

    out = sum over kept tiles T, keys c in T of e^(max_T - M - depth_c) V_c, over the sum of e^(...)

A maximum travels as an integer of the same order, NaN on top, since a GPU's max drops NaN.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from sparsefx.codegen.triton.attention.decode_part import base, scores, unordered, values

__all__ = ["CONSTANTS", "combine", "scores", "select", "values"]

CONSTANTS = {
    "DIM": 128,
    "PADDED": 128,
    "GROUP": 4,
    "BLOCK_K": 64,
    "MASK": "none",
    "ORDER": "sink_diagonal",
}
UNSEEN = tl.constexpr(-2139095041)  # ordered(-inf)


@triton.jit
def running_top(a, b):
    """The running maximum, of integers as `ordered` makes them."""
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["keys", "first", "tiles"])
def select(
    top,
    factor,
    chosen,
    counts,
    stats,
    kv_heads,
    keys,
    first,
    tiles,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
    ORDER: tl.constexpr,
):
    """chosen [pairs, tiles]: the kept tiles of a pair, counts [pairs] of them; stats: M of a row.

    A tile has UNITS maxima and is counted from the one that `first` lies in, which is tile 0 of the
    row only if `first` is 0. Rule: `sparsefx.attention.meaning.kept_tiles`.
    """
    pair = tl.program_id(0)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    part = tl.arange(0, UNITS)
    used = row < GROUP
    line = tl.cast(pair, tl.int64) * GROUP + row
    top += line[:, None] * (tiles * UNITS)
    chosen += tl.cast(pair, tl.int64) * tiles
    given = tl.load(factor + (pair % kv_heads) * GROUP + row, mask=used, other=1.0)
    ratio = tl.where(given > 0.0, given / tl.maximum(keys, 1).to(tl.float32), 1.0)
    limit = tl.where(given > 0.0, tl.minimum(tl.log(ratio), 0.0), float("-inf"))

    has_sink = (first == 0) & (ORDER == "sink_diagonal")
    sink = tl.load(top + part[None, :], mask=used[:, None], other=UNSEEN)
    carry = tl.where(has_sink, tl.max(sink, axis=1), UNSEEN)
    peak = tl.full((ROWS,), UNSEEN, tl.int32)
    number = 0
    blocks = tl.cdiv(tiles, BLOCK)
    for block in range(blocks):
        if ORDER == "sink_diagonal":
            tile = (blocks - 1 - block) * BLOCK + column
        else:
            tile = block * BLOCK + column
        exists = used[:, None] & (tile < tiles)[None, :]
        if UNITS == 1:
            most = tl.load(top + tile[None, :], mask=exists, other=UNSEEN)
        else:
            unit = tile[None, :, None] * UNITS + part[None, None, :]
            most = tl.load(top[:, :, None] + unit, mask=exists[:, :, None], other=UNSEEN)
            most = tl.max(most, axis=2)
        running = tl.associative_scan(most, 1, running_top, reverse=ORDER == "sink_diagonal")
        running = tl.maximum(running, carry[:, None])
        carry = tl.maximum(carry, tl.max(most, axis=1))
        running = tl.where(has_sink & (tile == 0)[None, :], most, running)
        gap = base(unordered(most)) - base(unordered(running))
        wanted = (most != UNSEEN) & ((gap >= limit[:, None]) | (gap != gap))
        keep = tl.max(wanted.to(tl.int32), axis=0)
        place = number + tl.cumsum(keep, axis=0) - keep
        tl.store(chosen + place, tile, mask=keep != 0)
        number += tl.sum(keep, axis=0)
        peak = tl.maximum(peak, tl.max(tl.where((keep != 0)[None, :], most, UNSEEN), axis=1))
    tl.store(counts + pair, number)
    tl.store(stats + line, unordered(peak), mask=used)


@triton.jit(do_not_specialize=["share", "splits"])
def combine(
    acc,
    sums,
    counts,
    out,
    share,
    splits,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [batch, heads, DIM]: the sum of p V over the sum of p, for one row."""
    line = tl.program_id(0)
    pair = line // GROUP
    row = line % GROUP
    dim = tl.arange(0, PADDED)
    wide = tl.cast(pair, tl.int64) * splits
    parts = tl.cdiv(tl.load(counts + pair) * BLOCK_K, share)
    result = tl.zeros((PADDED,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, parts, BLOCK):
        split = start + tl.arange(0, BLOCK)
        inside = split < parts
        here = (wide + split) * GROUP + row
        mine = inside[:, None] & (dim < DIM)[None, :]
        some = tl.load(acc + here[:, None] * DIM + dim[None, :], mask=mine, other=0.0)
        result += tl.sum(some, axis=0)
        total += tl.load(sums + (wide + split) * 2 * GROUP + row, mask=inside, other=0.0)
    whole = tl.sum(total, axis=0)
    result = result / tl.where(whole == 0.0, 1.0, whole)
    here = tl.cast(line, tl.int64) * DIM + dim
    tl.store(out + here, result.to(out.dtype.element_ty), mask=dim < DIM)
