"""Template of Top-Theta decode: one query a row, the keys split over programs, four launches.

scores (of skip-softmax decode) reads K once. select lists, for each KV head and split, the keys
that some query head of the group keeps; values gathers the rows of V on that list; combine adds
what the programs of a row have and lays the compensations on it.

V-mean compensation needs the mean of V over the keys that a row sees. Where the caller does not
give it, values reads all of V (READS "all"): exact, and no cheaper than dense attention.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from sparsefx.codegen.triton.attention.decode_part import base, scores, values

__all__ = ["CONSTANTS", "combine", "scores", "select", "values"]

CONSTANTS = {
    "DIM": 128,
    "PADDED": 128,
    "GROUP": 4,
    "MASK": "none",
    "PLACEMENT": "pre",
    "DENOMINATOR": "exact",
    "V_MEAN": 1,
}


@triton.jit
def share_between(lengths, count, points, POINTS: tl.constexpr):
    """Between which two of `lengths` each count lies, and how far: `attention.interpolate`."""
    point = tl.arange(0, POINTS)
    known = tl.load(lengths + point, mask=point < points, other=0)
    below = (known[None, :] < count[:, None]) & (point < points)[None, :]
    upper = tl.sum(below.to(tl.int32), axis=1)
    upper = tl.minimum(tl.maximum(upper, 1), points - 1)
    lower = tl.maximum(upper - 1, 0)
    upper = tl.maximum(upper, 0)
    start = tl.load(lengths + lower)
    width = tl.maximum(tl.load(lengths + upper) - start, 1)
    part = (count - start).to(tl.float32) / width.to(tl.float32)
    return lower, upper, tl.minimum(tl.maximum(part, 0.0), 1.0)


@triton.jit(do_not_specialize=["topk", "share", "splits", "points"])
def select(
    depth,
    parts,
    lengths,
    theta,
    lost,
    chosen,
    counts,
    stats,
    kv_heads,
    topk,
    span,
    share,
    splits,
    points,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    POINTS: tl.constexpr,
    BLOCK: tl.constexpr,
    READS: tl.constexpr,
    PLACEMENT: tl.constexpr,
    DENOMINATOR: tl.constexpr,
):
    """chosen [pairs, span]: the keys that `share` of a pair keep, counts [pairs, splits] of them.

    stats [pairs, 5, GROUP]: largest score M, threshold on the score or on e^(s - M), sum of
    e^(s - M), number of seen keys, and the calibrated lost sum of each row.
    """
    pair = tl.program_id(0)
    split = tl.program_id(1)
    wide = tl.cast(pair, tl.int64)
    row = tl.arange(0, ROWS)
    used = row < GROUP
    parts += wide * splits * 3 * GROUP + row[:, None]
    most = tl.full((ROWS, BLOCK), float("-inf"), tl.float32)
    for start in range(0, splits, BLOCK):
        each = start + tl.arange(0, BLOCK)
        inside = used[:, None] & (each < splits)[None, :]
        here = parts + each[None, :] * 3 * GROUP
        most = tl.maximum(most, tl.load(here, mask=inside, other=float("-inf")))
    peak = tl.max(most, axis=1)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    seen = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, splits, BLOCK):
        each = start + tl.arange(0, BLOCK)
        inside = used[:, None] & (each < splits)[None, :]
        here = parts + each[None, :] * 3 * GROUP
        most = tl.load(here, mask=inside, other=float("-inf"))
        some = tl.load(here + GROUP, mask=inside, other=0.0)
        total += some * tl.exp(most - base(peak)[:, None])
        seen += tl.load(here + 2 * GROUP, mask=inside, other=0.0)
    total = tl.sum(total, axis=1)
    seen = tl.sum(seen, axis=1)

    count = seen.to(tl.int64)
    lower, upper, part = share_between(lengths, count, points, POINTS)
    head = ((pair % kv_heads) * GROUP + row) * points
    low = tl.load(theta + head + lower, mask=used, other=0.0)
    limit = low + part * (tl.load(theta + head + upper, mask=used, other=0.0) - low)
    if PLACEMENT == "post":
        limit = limit * total
    limit = tl.where(count <= topk, float("-inf"), limit)
    if split == 0:
        mine = stats + wide * 5 * GROUP + row
        tl.store(mine, peak, mask=used)
        tl.store(mine + GROUP, limit, mask=used)
        tl.store(mine + 2 * GROUP, total, mask=used)
        tl.store(mine + 3 * GROUP, seen, mask=used)
        if DENOMINATOR == "offline":
            first = tl.load(lost + head + lower, mask=used, other=0.0)
            mean = first + part * (tl.load(lost + head + upper, mask=used, other=0.0) - first)
            tl.store(mine + 4 * GROUP, mean, mask=used)

    if READS == "keys":
        depth += (wide * GROUP + row)[:, None] * span
        chosen += wide * span + split * share
        number = 0
        for at in range(0, tl.minimum(share, span - split * share), STEP):
            key = split * share + at + tl.arange(0, STEP)
            subject = tl.load(depth + key[None, :], mask=used[:, None], other=float("-inf"))
            visible = subject != float("-inf")
            if PLACEMENT == "post":
                subject = tl.exp(subject - base(peak)[:, None])
            keep = visible & ((subject > limit[:, None]) | (subject != subject))
            some = tl.max(keep.to(tl.int32), axis=0)
            place = number + tl.cumsum(some, axis=0) - some
            tl.store(chosen + place, key, mask=some != 0)
            number += tl.sum(some, axis=0)
        tl.store(counts + wide * splits + split, number)


@triton.jit(do_not_specialize=["splits"])
def combine(
    acc,
    sums,
    means,
    counts,
    stats,
    out,
    splits,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    READS: tl.constexpr,
    PLACEMENT: tl.constexpr,
    DENOMINATOR: tl.constexpr,
    V_MEAN: tl.constexpr,
):
    """out [batch, heads, DIM]: the sum of p V over what stands for the sum of all p, for one row.

    V_MEAN: the lost mass goes to the mean of V over the seen keys, which is `means` [batch, heads,
    DIM] or, where values read all, its sums in `means` [pairs, splits, GROUP, DIM].
    """
    line = tl.program_id(0)
    pair = line // GROUP
    row = line % GROUP
    dim = tl.arange(0, PADDED)
    inside_dim = dim < DIM
    wide = tl.cast(pair, tl.int64) * splits
    result = tl.zeros((PADDED,), tl.float32)
    seen = tl.zeros((PADDED,), tl.float32)
    kept = tl.zeros((BLOCK,), tl.float32)
    number = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, splits, BLOCK):
        split = start + tl.arange(0, BLOCK)
        inside = split < splits
        if READS == "keys":
            inside = inside & (tl.load(counts + wide + split, mask=inside, other=0) > 0)
        here = ((wide + split) * GROUP + row)[:, None] * DIM + dim[None, :]
        mine = inside[:, None] & inside_dim[None, :]
        result += tl.sum(tl.load(acc + here, mask=mine, other=0.0), axis=0)
        if READS == "all":
            seen += tl.sum(tl.load(means + here, mask=mine, other=0.0), axis=0)
        place = sums + (wide + split) * 2 * GROUP + row
        kept += tl.load(place, mask=inside, other=0.0)
        number += tl.load(place + GROUP, mask=inside, other=0.0)

    stats += tl.cast(pair, tl.int64) * 5 * GROUP + row
    count = tl.load(stats + 3 * GROUP)
    mass = tl.sum(kept, axis=0)
    if PLACEMENT == "post" or DENOMINATOR == "exact":
        total = tl.load(stats + 2 * GROUP)
    else:
        dropped = count - tl.sum(number, axis=0)
        missing = 0.0
        if DENOMINATOR == "exp_threshold":
            depth = tl.load(stats + GROUP) - base(tl.load(stats))
            missing = tl.where(dropped > 0.0, dropped * tl.exp(depth), 0.0)
        elif DENOMINATOR == "offline":
            missing = tl.where(dropped > 0.0, tl.load(stats + 4 * GROUP), 0.0)
        total = mass + missing
    total = tl.where(total == 0.0, 1.0, total)
    result = result / total
    here = tl.cast(line, tl.int64) * DIM + dim
    if V_MEAN:
        if READS == "all":
            mean = seen / tl.maximum(count, 1.0)
        else:
            mean = tl.load(means + here, mask=inside_dim, other=0.0)
        result += (1.0 - mass / total) * mean
    tl.store(out + here, result.to(out.dtype.element_ty), mask=inside_dim)
