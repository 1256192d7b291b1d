"""Template of attention over listed key tiles: flash attention that walks a list, without a branch.

`tiles` [.., row tiles, key tiles] lists, for BLOCK_Q rows of a head, the key tiles to visit: first
`counts[.., 0]` tiles that every row sees whole, then those that need masking, `counts[.., 1]` in
all. Loads are indirect, but the compiler knows the list and pipelines both K and V.
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
}


@triton.jit(do_not_specialize=["queries", "keys", "window"])
def kernel(
    q,
    k,
    v,
    mask,
    tiles,
    counts,
    out,
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
    list_batch,
    list_head,
    list_length,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """out [batch, heads, queries, DIM].

    tiles int32 [.., row tiles, list_length], contiguous; counts int32 [.., row tiles, 2];
    list_batch, list_head: row tiles between lists of neighbouring batch entries and heads, 0 where
    they share them. Other strides are in elements; the last of q, k, v and out is 1.
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
    listed = batch * list_batch + head.to(tl.int64) * list_head + row_tile
    tiles += listed * list_length
    whole = tl.load(counts + listed * 2)
    end = tl.load(counts + listed * 2 + 1)

    row = row_tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    position = row + (keys - queries)
    lane = tl.arange(0, PADDED)
    row_inside = row < queries
    own = row_inside[:, None] & (lane < DIM)[None, :]
    q_at = q + row.to(tl.int64)[:, None] * q_row + lane[None, :]
    q_tile = tl.load(q_at, mask=own, other=0.0)
    mask_at = row.to(tl.int64) * mask_row
    if MASK != "none":
        mask_at = mask + batch * mask_batch + head.to(tl.int64) * mask_head + mask_at
    if not NATURAL:
        scale = scale * 1.4426950408889634

    acc = tl.zeros((BLOCK_Q, PADDED), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    for part in tl.static_range(2):
        RAW = MASK == "none" and part == 0  # then the scores still lack `scale`
        if part == 0:
            start = 0
            stop = whole
        else:
            start = whole
            stop = end
        for visit in range(start, stop):
            tile = tl.load(tiles + visit)
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
                part != 0,
                DIM,
                PADDED,
                BLOCK_K,
                MASK,
                CAUSAL,
                WINDOWED,
            )
            v_tile = tile_values(v, tile, keys, v_row, part != 0, DIM, PADDED, BLOCK_K)
            best = tl.reduce(s, 1, larger)
            if RAW:
                best = best * scale
            new = larger(top, best)
            base = tl.where(new == float("-inf"), 0.0, new)  # the row has seen no key yet
            shrink = power(top - base, NATURAL)
            if RAW:
                p = power(s * scale - base[:, None], NATURAL)
            else:
                p = power(s - base[:, None], NATURAL)
            total = total * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None]
            acc = tl.dot(p.to(q_tile.dtype), v_tile, acc, input_precision="ieee")
            top = new

    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    out_at = out + row.to(tl.int64)[:, None] * out_row + lane[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=own)
