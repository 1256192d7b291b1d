"""The plain-PyTorch meaning of the sparse attention operators, which is their definition.

Scores and sums are float32, or float64 for float64 inputs; results are in q's dtype. Shapes, masks
and the alignment of causal rows: dense.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefx.attention.dense import is_visible
from sparsefx.attention.interpolate import at_lengths

_NEVER = float("-inf")


def scores(
    q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, scale: float, window: int
) -> Tensor:
    """scale Q K^T + mask, [batch, heads, queries, keys]; -inf where a query does not see a key."""
    wide = _wide(q)
    product: Tensor = wide @ spread(_wide(k), q.shape[1]).transpose(-1, -2) * scale
    if mask is not None and mask.dtype != torch.bool:
        product += mask.to(product.dtype)
    elif mask is not None:
        product.masked_fill_(~mask, _NEVER)
    visible = is_visible(q.shape[-2], k.shape[-2], is_causal, window, q.device)
    if visible is not None:
        product.masked_fill_(~visible, _NEVER)
    return product


def tile_maxima(s: Tensor, block_k: int) -> Tensor:
    """Largest score of each row in each key tile: [..., keys] -> [..., tiles]; -inf if unseen."""
    tiles = -(-s.shape[-1] // block_k)
    padded = F.pad(s, (0, tiles * block_k - s.shape[-1]), value=_NEVER)
    maxima: Tensor = padded.unflatten(-1, (tiles, block_k)).amax(-1)
    return maxima


def running_maxima(maxima: Tensor, order: str) -> Tensor:
    """The running maximum of a row when it meets each tile, that tile included.

    maxima [..., tiles]. "ascending" visits 0, 1, 2, ...; "sink_diagonal" visits 0, last, last-1,
    ..., 1: tiles behind the diagonal are -inf and change nothing, so "last" is the diagonal.
    """
    if not maxima.shape[-1]:
        return maxima
    if order == "ascending":
        return maxima.cummax(-1).values
    sink = maxima[..., :1]
    behind = maxima.flip(-1).cummax(-1).values.flip(-1)
    return torch.cat((sink, torch.maximum(behind[..., 1:], sink)), -1)


def log_lambda(factor: Tensor, keys: int) -> Tensor:
    """ln(factor / keys) of each head, at most 0: a tile that raises the maximum always stays."""
    return (factor / max(keys, 1)).log().clamp(max=0)


def kept_tiles(
    s: Tensor, kv_heads: int, factor: Tensor, block_q: int, block_k: int, order: str
) -> Tensor:
    """Which tiles skip-softmax attention computes: bool [batch, heads, row tiles, key tiles].

    s: `scores`; factor [heads]. A tile stays if a row's largest score in it is not below the
    running maximum by more than -ln(lambda). A tile has `block_q` rows of one head; with a single
    query (decode) its rows are the heads that share a KV head, because they read the same V.
    Tiles in which no row sees a key are not computed.
    """
    maxima = tile_maxima(s, block_k)
    depth = maxima - running_maxima(maxima, order)  # NaN where a score is NaN: stays
    limit = log_lambda(factor.to(s.dtype), s.shape[-1]).view(-1, 1, 1)
    wanted: Tensor = (maxima != _NEVER) & ~(depth < limit)
    batch, heads, queries, tiles = wanted.shape
    if queries == 1:
        by_group = wanted.view(batch, kv_heads, heads // kv_heads, tiles).any(2, keepdim=True)
        return by_group.expand(batch, kv_heads, heads // kv_heads, tiles).reshape(wanted.shape)
    rows = -(-queries // block_q)
    padded = F.pad(wanted, (0, 0, 0, rows * block_q - queries), value=False)
    kept: Tensor = padded.unflatten(2, (rows, block_q)).any(3)
    return kept


def skip_softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    prefill: Tensor,
    decode: Tensor,
    is_causal: bool,
    scale: float,
    window: int,
    block_q: int,
    block_k: int,
    order: str,
) -> Tensor:
    """Softmax attention, renormalised over the tiles that `kept_tiles` keeps.

    prefill, decode: float32 [heads], scale factors for more than one query and for one.
    """
    s = scores(q, k, mask, is_causal, scale, window)
    factor = decode if q.shape[-2] == 1 else prefill
    keep = kept_tiles(s, k.shape[1], factor, block_q, block_k, order)
    s = s.masked_fill(~_elements(keep, s, block_q, block_k), _NEVER)
    return _weighted(softmax(s), v, q)


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    keep: Tensor,
    is_causal: bool,
    scale: float,
    window: int,
    block_q: int,
    block_k: int,
) -> Tensor:
    """Softmax attention over the tiles that `keep` lists.

    keep: bool [batch or 1, heads or 1, row tiles, key tiles] of block_q x block_k tiles.
    """
    s = scores(q, k, mask, is_causal, scale, window)
    s = s.masked_fill(~_elements(keep, s, block_q, block_k), _NEVER)
    return _weighted(softmax(s), v, q)


def theta_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    lengths: Tensor,
    theta: Tensor,
    lost: Tensor | None,
    is_causal: bool,
    scale: float,
    window: int,
    topk: int,
    placement: str,
    denominator: str,
    v_mean: bool,
) -> Tensor:
    """Attention over the elements above the threshold of their head and row length.

    lengths: int64 [points], ascending; theta: float32 [heads, points], threshold of a row with that
    many visible keys; lost: float32 [heads, points] for denominator "offline". Rows that see at
    most `topk` keys stay dense. What the options mean: `attention.spec.Theta`.
    """
    s = scores(q, k, mask, is_causal, scale, window)
    visible = s != _NEVER
    count = visible.sum(-1, keepdim=True)  # visible keys of each row
    limit = at_lengths(lengths, theta, count[..., 0])[..., None].to(s.dtype)
    dense = softmax(s)
    above = (dense if placement == "post" else s) > limit
    keep = visible & (above | (count <= topk) | dense.isnan())  # NaN where dense has it
    p = dense.masked_fill(~keep, 0)
    if placement == "pre" and denominator != "exact":
        top = s.amax(-1, keepdim=True)
        weight = (s - top.masked_fill(top == _NEVER, 0)).exp()
        kept = weight.masked_fill(~keep, 0)
        missing = _missing(denominator, lengths, lost, count, visible & ~keep, limit - top)
        total = kept.sum(-1, keepdim=True) + missing
        p = kept / total.masked_fill(total == 0, 1)
    result = p @ spread(_wide(v), q.shape[1])
    if v_mean:
        result = result + (1 - p.sum(-1, keepdim=True)) * _visible_mean(visible, count, v)
    return shaped(result, q)


def _missing(
    denominator: str,
    lengths: Tensor,
    lost: Tensor | None,
    count: Tensor,
    dropped: Tensor,
    depth: Tensor,
) -> Tensor:
    """What stands for the dropped part of the softmax's sum, [batch, heads, queries, 1]."""
    number = dropped.sum(-1, keepdim=True)
    if denominator == "exp_threshold":
        return torch.where(number > 0, number * depth.exp(), 0)
    if denominator == "offline" and lost is not None:
        mean = at_lengths(lengths, lost, count[..., 0])[..., None].to(depth.dtype)
        return torch.where(number > 0, mean, 0)
    return torch.zeros_like(depth)


def _visible_mean(visible: Tensor, count: Tensor, v: Tensor) -> Tensor:
    """The mean of V over the keys that each row sees, 0 for a row that sees none."""
    values = spread(_wide(v), visible.shape[1])
    return (visible.to(values.dtype) @ values) / count.clamp(min=1)


def softmax(s: Tensor) -> Tensor:
    """Softmax over the last axis; a row of nothing but -inf gives 0, as in torch's attention."""
    top = s.amax(-1, keepdim=True) if s.shape[-1] else s.new_zeros((*s.shape[:-1], 1))
    weight = (s - top.masked_fill(top == _NEVER, 0)).exp()
    total = weight.sum(-1, keepdim=True)
    return weight / total.masked_fill(total == 0, 1)


def spread(kv: Tensor, heads: int) -> Tensor:
    """K or V with one head for each query head: [batch, kv_heads, ...] -> [batch, heads, ...]."""
    return kv if kv.shape[1] == heads else kv.repeat_interleave(heads // kv.shape[1], dim=1)


def shaped(result: Tensor, q: Tensor) -> Tensor:
    """In q's dtype, [batch, heads, queries, dim] over memory that is [batch, queries, heads, dim].

    That is what torch's attention returns on CPU, and what models ask for next.
    """
    return result.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def _weighted(p: Tensor, v: Tensor, q: Tensor) -> Tensor:
    return shaped(p @ spread(_wide(v), q.shape[1]), q)


def _elements(keep: Tensor, s: Tensor, block_q: int, block_k: int) -> Tensor:
    """A map of tiles as a map of elements, [batch, heads, queries, keys]."""
    rows = keep.repeat_interleave(block_q, dim=-2)[..., : s.shape[-2], :]
    return rows.repeat_interleave(block_k, dim=-1)[..., : s.shape[-1]]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
