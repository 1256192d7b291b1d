"""Template of skip-softmax attention with many queries: flash attention that drops key tiles.

A program owns BLOCK_Q rows of one head and visits the key tiles that any of them sees. It computes
the scores S of a tile and its row maxima; if no row comes within -ln(lambda) of its running maximum
(`sparsefx.attention.meaning.kept_tiles`), the tile ends there, without exp, V or P V. Else

    new = max(top, rowmax(S))    P = 2^(S - new)    total = total 2^(top - new) + rowsum(P)
    acc = acc 2^(top - new) + P V    top = new

A load in a branch is not pipelined by the compiler. With DEFER, P and the loaded V stay in
registers until the next kept tile, which first adds their product, so that V arrives while the next
scores are computed.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from sparsefx.codegen.triton.attention.tile_part import larger, power, tile_scores, tile_values

CONSTANTS = {
    "DIM": 64,
    "PADDED": 64,
    "GROUP": 1,
    "BLOCK_Q": 64,
    "BLOCK_K": 64,
    "MASK": "none",
    "CAUSAL": 1,
    "WINDOWED": 0,
    "ORDER": "sink_diagonal",
    "DEFER": 1,
    "FLAT": 0,
}


@triton.jit(do_not_specialize=["queries", "keys", "window"])
def kernel(  # noqa: C901  the branches are on constants
    q,
    k,
    v,
    mask,
    factor,
    out,
    counts,
    queries,
    keys,
    window,
    scale,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    mask_batch,
    mask_head,
    mask_row,
    mask_column,
    out_batch,
    out_head,
    out_row,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    ORDER: tl.constexpr,
    DEFER: tl.constexpr,
    FLAT: tl.constexpr,
):
    """out [batch, heads, queries, DIM]; counts [batch, heads, row tiles] of computed tiles or None.

    factor [heads]; `scale` is not negative. Strides are in elements; the last of q, k, v and out
    is 1. FLAT: the vote in the one form that Triton compiles for tensor memory.
    """
    NATURAL: tl.constexpr = MASK == "float"
    row_tile = tl.num_programs(0) - 1 - tl.program_id(0)  # causal: the longest rows start first
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    kv_head = (head // GROUP).to(tl.int64)
    q += batch * q_batch + head.to(tl.int64) * q_head
    k += batch * k_batch + kv_head * k_head
    v += batch * v_batch + kv_head * v_head
    out += batch * out_batch + head.to(tl.int64) * out_head

    first = row_tile * BLOCK_Q
    row = first + tl.arange(0, BLOCK_Q)
    lane = tl.arange(0, PADDED)
    row_inside = row < queries
    own = row_inside[:, None] & (lane < DIM)[None, :]
    q_at = q + row.to(tl.int64)[:, None] * q_row + lane[None, :]
    q_tile = tl.load(q_at, mask=own, other=0.0)
    mask_at = row.to(tl.int64) * mask_row
    if MASK != "none":
        mask_at = mask + batch * mask_batch + head.to(tl.int64) * mask_head + mask_at

    # lambda = factor / keys, at most 1; a factor of 0 skips nothing that is seen
    share = tl.load(factor + head).to(tl.float32) / keys
    limit = tl.where(share > 0, tl.math.log2(tl.maximum(share, 1e-37)), float("-inf"))
    limit = tl.minimum(limit, 0.0)
    if NATURAL:
        limit = limit / 1.4426950408889634
    else:
        scale = scale * 1.4426950408889634

    # key tiles low .. high are seen by some row, whole_low .. whole_high entirely by each row
    position = row + (keys - queries)
    start = first + (keys - queries)
    stop = tl.minimum(first + BLOCK_Q, queries) + (keys - queries)
    low = 0
    whole_low = 0
    high = tl.cdiv(keys, BLOCK_K)
    whole_high = keys // BLOCK_K
    if CAUSAL:
        high = tl.minimum(high, tl.cdiv(tl.maximum(stop, 0), BLOCK_K))
        whole_high = tl.minimum(whole_high, tl.maximum(start + 1, 0) // BLOCK_K)
    if WINDOWED:
        low = tl.minimum(tl.maximum(start - window + 1, 0) // BLOCK_K, high)
        whole_low = tl.cdiv(tl.maximum(stop - window, 0), BLOCK_K)
        whole_low = tl.minimum(tl.maximum(whole_low, low), high)
    whole_high = tl.maximum(whole_high, whole_low)

    # visits 0 .. before and after .. end meet tiles that need masking, those between do not
    end = high - low
    if ORDER == "sink_diagonal":
        sink = tl.where((low == 0) & (high > 0), 1, 0)
        before = tl.minimum(sink + high - whole_high, end)
        after = before + tl.maximum(whole_high - tl.maximum(whole_low, sink), 0)
    else:
        before = whole_low - low
        after = whole_high - low

    acc = tl.zeros((BLOCK_Q, PADDED), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    computed = 0
    if DEFER:
        held_p = tl.zeros((BLOCK_Q, BLOCK_K), q_tile.dtype)
        held_v = tl.zeros((BLOCK_K, PADDED), q_tile.dtype)
    for part in tl.static_range(3):
        RAW = MASK == "none" and part == 1  # then the scores still lack `scale`
        if part == 0:
            from_visit = 0
            to_visit = before
        elif part == 1:
            from_visit = before
            to_visit = after
        else:
            from_visit = after
            to_visit = end
        for visit in range(from_visit, to_visit):
            if ORDER == "sink_diagonal":
                tile = tl.where(visit < sink, 0, high - 1 - visit + sink)
            else:
                tile = low + visit
            s = tile_scores(
                q_tile,
                k,
                mask_at,
                tile,
                keys,
                window,
                scale,
                position,
                row_inside,
                k_row,
                mask_column,
                part != 1,
                DIM,
                PADDED,
                BLOCK_K,
                MASK,
                CAUSAL,
                WINDOWED,
            )
            best = tl.reduce(s, 1, larger)
            if RAW:
                best = best * scale
            new = larger(top, best)
            base = tl.where(new == float("-inf"), 0.0, new)  # the row has seen no key yet
            # said so that NaN keeps the tile
            vote = row_inside & (best != float("-inf")) & ~(best - base < limit)
            kept = tl.max(vote.to(tl.int32)) if FLAT else tl.max(vote.to(tl.int32), 0)
            if kept != 0:
                if DEFER:
                    acc = tl.dot(held_p, held_v, acc, input_precision="ieee")
                v_tile = tile_values(v, tile, keys, v_row, part != 1, DIM, PADDED, BLOCK_K)
                shrink = power(top - base, NATURAL)
                if RAW:
                    p = power(s * scale - base[:, None], NATURAL)
                else:
                    p = power(s - base[:, None], NATURAL)
                total = total * shrink + tl.sum(p, 1)
                acc = acc * shrink[:, None]
                if DEFER:
                    held_p = p.to(q_tile.dtype)
                    held_v = v_tile
                else:
                    acc = tl.dot(p.to(q_tile.dtype), v_tile, acc, input_precision="ieee")
                top = new
                computed += 1

    if DEFER:
        acc = tl.dot(held_p, held_v, acc, input_precision="ieee")
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    out_at = out + row.to(tl.int64)[:, None] * out_row + lane[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=own)
    if counts is not None:
        count_at = (tl.program_id(2) * tl.num_programs(1) + head) * tl.num_programs(0) + row_tile
        tl.store(counts + count_at, computed)
