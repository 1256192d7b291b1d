"""What attention templates do to one key tile; `emit` prints it in place of a template's import.

Scores are in units of log 2, or of e (NATURAL) under a float mask, whose entries may be the least
float and would overflow if scaled.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def larger(a, b):
    """The maximum, NaN if either is NaN: a NaN score must reach the vote and the result."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def power(exponent, NATURAL: tl.constexpr):
    """2^exponent, or e^exponent."""
    if NATURAL:
        exponent = exponent * 1.4426950408889634
    return tl.math.exp2(exponent)


@triton.jit
def tile_scores(
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
    EDGE: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """scale Q K^T + mask of one key tile, -inf where a row does not see a key.

    k: the first key of the head; mask_at: the first key's mask entry of each row; position: that of
    each row among the keys. EDGE: some row may not see all of the tile, or the keys end in it.
    Without mask and EDGE the scores are not scaled yet.
    """
    column = tl.arange(0, BLOCK_K)
    lane = tl.arange(0, PADDED)
    key = tile * BLOCK_K + column
    key_inside = key < keys
    k_at = k + (tile * BLOCK_K).to(tl.int64) * k_row + column[None, :] * k_row + lane[:, None]
    if EDGE:
        k_tile = tl.load(k_at, mask=key_inside[None, :] & (lane < DIM)[:, None], other=0.0)
    elif DIM != PADDED:
        k_tile = tl.load(k_at, mask=(lane < DIM)[:, None], other=0.0)
    else:
        k_tile = tl.load(k_at)
    s = tl.dot(q_tile, k_tile, input_precision="ieee")
    if MASK != "none" or EDGE:
        s = s * scale
    if MASK != "none":
        known = row_inside[:, None] & key_inside[None, :]
        at = mask_at[:, None] + key.to(tl.int64)[None, :] * mask_column
        given = tl.load(at, mask=known, other=0)
        s = s + given.to(tl.float32) if MASK == "float" else tl.where(given != 0, s, float("-inf"))
    if EDGE:
        visible = key_inside[None, :]
        if CAUSAL:
            visible = visible & (key[None, :] <= position[:, None])
        if WINDOWED:
            visible = visible & (key[None, :] > position[:, None] - window)
        s = tl.where(visible, s, float("-inf"))
    return s


@triton.jit
def tile_values(
    v,
    tile,
    keys,
    v_row,
    EDGE: tl.constexpr,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """V of one key tile, [BLOCK_K, PADDED]; v: the first key of the head."""
    column = tl.arange(0, BLOCK_K)
    lane = tl.arange(0, PADDED)
    inside = (tile * BLOCK_K + column < keys)[:, None] & (lane < DIM)[None, :]
    v_at = v + (tile * BLOCK_K).to(tl.int64) * v_row + column[:, None] * v_row + lane[None, :]
    if EDGE:
        return tl.load(v_at, mask=inside, other=0.0)
    elif DIM != PADDED:
        return tl.load(v_at, mask=(lane < DIM)[None, :], other=0.0)
    else:
        return tl.load(v_at)
