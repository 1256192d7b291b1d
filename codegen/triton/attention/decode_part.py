"""What the decode templates share: the launch that reads K and the launch that reads V.

`emit` prints it in place of a template's import. A pair is a batch and a KV head, a row one of its
GROUP query heads, a split one of the programs that share the keys of a pair. Key `first + i` is
column i of a buffer, and `span` is how many columns there are.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def ordered(x):
    """float32 as int32 in the same order; every NaN is above infinity."""
    bits = tl.where(x != x, 0x7FC00000, x.to(tl.int32, bitcast=True))
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def unordered(word):
    """Inverse of `ordered`."""
    return (word ^ ((word >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def base(x):
    """What depths are counted from: the maximum, or 0 where nothing is seen."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit(do_not_specialize=["keys", "low", "first", "share", "splits"])
def scores(
    q,
    k,
    mask,
    depth,
    top,
    parts,
    scale,
    kv_heads,
    keys,
    low,
    first,
    span,
    share,
    splits,
    q_batch,
    q_head,
    k_batch,
    k_head,
    k_key,
    mask_batch,
    mask_head,
    mask_key,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    UNIT: tl.constexpr,
    MASK: tl.constexpr,
    MASK_HEADS: tl.constexpr,
    SUMS: tl.constexpr,
):
    """top [pairs, GROUP, span / UNIT]: largest scores; depth [pairs, GROUP, span]: how far below.

    Of `share` keys; those from `low` on are seen. SUMS: depth holds the scores instead, and parts
    [pairs, splits, 3, GROUP] the split's largest score, sum of e^(s - largest) and number of seen
    keys. MASK_HEADS: the mask differs between heads.
    """
    pair = tl.program_id(0)
    split = tl.program_id(1)
    batch = tl.cast(pair // kv_heads, tl.int64)
    head = pair % kv_heads
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, PADDED)
    column = tl.arange(0, STEP)
    used = row < GROUP
    query = head * GROUP + row
    q += batch * q_batch
    x = tl.load(
        q + query[:, None] * q_head + dim[None, :],
        mask=used[:, None] & (dim < DIM)[None, :],
        other=0.0,
    )
    wide_key = tl.cast(k_key, tl.int64)
    k += batch * k_batch + tl.cast(head, tl.int64) * k_head
    line = tl.cast(pair, tl.int64) * GROUP + row
    depth += line[:, None] * span
    if not SUMS:
        top += line[:, None] * (span // UNIT)
    if MASK != "none":
        mask += batch * mask_batch
        if MASK_HEADS:
            mask += tl.cast(query[:, None], tl.int64) * mask_head

    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    seen = tl.zeros((ROWS,), tl.int32)
    start = split * share
    for at in range(start, tl.minimum(start + share, span), STEP):
        key = first + at + column
        inside = key < keys
        tile = tl.load(
            k + (first + at) * wide_key + column[:, None] * k_key + dim[None, :],
            mask=inside[:, None] & (dim < DIM)[None, :],
            other=0.0,
        )
        s = tl.dot(x, tl.trans(tile), input_precision="ieee") * scale
        visible = used[:, None] & (inside & (key >= low))[None, :]
        if MASK != "none":
            here = mask + tl.cast(key, tl.int64)[None, :] * mask_key
            if MASK_HEADS:
                given = tl.load(here, mask=visible, other=0)
            else:
                given = tl.load(here, mask=inside[None, :], other=0)
            if MASK == "bool":
                visible = visible & (given != 0)
            else:
                s += given.to(tl.float32)
        s = tl.where(visible, s, float("-inf"))
        if SUMS:
            tl.store(depth + at + column[None, :], s, mask=used[:, None])
            higher = tl.maximum(peak, tl.max(s, axis=1))
            total = total * tl.exp(peak - base(higher))
            total += tl.sum(tl.exp(s - base(higher)[:, None]), axis=1)
            peak = higher
            seen += tl.sum((s != float("-inf")).to(tl.int32), axis=1)
        else:
            unit = (at // UNIT) + tl.arange(0, STEP // UNIT)
            whole = tl.reshape(s, (ROWS, STEP // UNIT, UNIT))
            most = tl.max(ordered(whole), axis=2)
            below = base(unordered(most))[:, :, None] - whole
            below = tl.reshape(below, (ROWS, STEP)).to(depth.dtype.element_ty)
            tl.store(top + unit[None, :], most, mask=used[:, None])
            tl.store(depth + at + column[None, :], below, mask=used[:, None])
    if SUMS:
        parts += (tl.cast(pair, tl.int64) * splits + split) * 3 * GROUP + row
        tl.store(parts, peak, mask=used)
        tl.store(parts + GROUP, total, mask=used)
        tl.store(parts + 2 * GROUP, seen.to(tl.float32), mask=used)


@triton.jit(do_not_specialize=["keys", "first", "share", "splits"])
def values(  # noqa: C901 (constants decide its branches)
    v,
    depth,
    top,
    chosen,
    counts,
    stats,
    acc,
    sums,
    means,
    kv_heads,
    keys,
    first,
    span,
    share,
    splits,
    v_batch,
    v_head,
    v_key,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
    READS: tl.constexpr,
    FIELDS: tl.constexpr,
    PLACEMENT: tl.constexpr,
):
    """acc [pairs, splits, GROUP, DIM], sums [pairs, splits, 2, GROUP]: sums of p V; of p, of kept.

    READS "tiles": `share` keys of the pair's list of tiles; "keys": the program's own list of keys;
    "all": its `share` of all keys, and means, the sum of V over seen keys. FIELDS: rows of stats;
    with more than one, a threshold on the score or (PLACEMENT "post") on e^(s - M) is the second.
    """
    pair = tl.program_id(0)
    split = tl.program_id(1)
    wide = tl.cast(pair, tl.int64)
    if READS == "tiles":
        left = tl.load(counts + pair) * TILE - split * share
        chosen += wide * (span // TILE) + split * (share // TILE)
    elif READS == "keys":
        left = tl.load(counts + wide * splits + split)
        chosen += wide * span + split * share
    else:
        left = span - split * share
    left = tl.minimum(left, share)
    if left <= 0:
        return
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, PADDED)
    column = tl.arange(0, STEP)
    used = row < GROUP
    wide_key = tl.cast(v_key, tl.int64)
    v += (pair // kv_heads).to(tl.int64) * v_batch + (pair % kv_heads).to(tl.int64) * v_head
    v += first * wide_key
    line = wide * GROUP + row
    depth += line[:, None] * span
    if FIELDS == 1:
        top += line * (span // UNIT)
    stats += wide * FIELDS * GROUP + row
    peak = base(tl.load(stats, mask=used, other=0.0))
    if FIELDS > 1:
        limit = tl.load(stats + GROUP, mask=used, other=0.0)

    result = tl.zeros((ROWS, PADDED), tl.float32)
    total = tl.zeros((ROWS, STEP), tl.float32)
    number = tl.zeros((ROWS, STEP), tl.int32)
    if READS == "all":
        seen = tl.zeros((ROWS, PADDED), tl.float32)
    for at in range(0, left, STEP):
        inside = at + column < left
        if READS == "all":
            begin = split * share + at
        elif TILE >= STEP:
            begin = tl.load(chosen + at // TILE) * TILE + at % TILE
        if READS == "all" or TILE >= STEP:
            key = begin + column
        else:
            listed = tl.load(chosen + (at + column) // TILE, mask=inside, other=0)
            key = listed * TILE + (at + column) % TILE
        inside = inside & (first + key < keys)
        tile = tl.load(
            v + key.to(tl.int64)[:, None] * wide_key + dim[None, :],
            mask=inside[:, None] & (dim < DIM)[None, :],
            other=0.0,
        )
        active = used[:, None] & inside[None, :]
        if FIELDS > 1:
            score = tl.load(depth + key[None, :], mask=active, other=float("-inf"))
            p = tl.exp(score - peak[:, None])
            subject = p if PLACEMENT == "post" else score
            visible = score != float("-inf")
            keep = visible & ((subject > limit[:, None]) | (subject != subject))
            p = tl.where(keep, p, 0.0)
            number += keep.to(tl.int32)
        else:
            below = tl.load(depth + key[None, :], mask=active, other=float("inf")).to(tl.float32)
            if TILE >= STEP:
                most = tl.load(top + begin // UNIT, mask=used, other=0)[:, None]
            else:
                most = tl.load(top[:, None] + (key // UNIT)[None, :], mask=used[:, None], other=0)
            p = tl.exp(base(unordered(most)) - peak[:, None] - below)
        total += p
        result = tl.dot(p.to(tile.dtype), tile, result, input_precision="ieee")
        if READS == "all":
            seen = tl.dot(visible.to(tile.dtype), tile, seen, input_precision="ieee")

    part = wide * splits + split
    inside = used[:, None] & (dim < DIM)[None, :]
    here = (part * GROUP + row)[:, None] * DIM + dim[None, :]
    tl.store(acc + here, result, mask=inside)
    sums += part * 2 * GROUP + row
    tl.store(sums, tl.sum(total, axis=1), mask=used)
    if FIELDS > 1:
        tl.store(sums + GROUP, tl.sum(number, axis=1).to(tl.float32), mask=used)
    if READS == "all":
        tl.store(means + here, seen, mask=inside)
