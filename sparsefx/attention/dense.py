"""Dense attention as the dialect counts rows and keys, by the fastest that torch has."""

import torch
import torch.nn.functional as F
from torch import Tensor


def is_visible(
    queries: int, keys: int, is_causal: bool, window: int, device: torch.device
) -> Tensor | None:
    """Bool [queries, keys], True where a query sees a key; None if it sees all.

    Query i stands at position keys - queries + i (aligned to the bottom right). is_causal: no key
    beyond it; window: no key `window` or more positions before it, 0 for no window.
    """
    if not is_causal and not window:
        return None
    position = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)[None, :]
    visible = key <= position if is_causal else torch.ones_like(key <= position)
    return visible & (key > position - window) if window else visible


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    window: int,
) -> Tensor:
    """softmax(scale Q K^T + mask) V by `scaled_dot_product_attention`.

    q [batch, heads, queries, dim]; k, v [batch, kv_heads, keys, dim], heads a multiple of kv_heads;
    mask bool (True = seen) or float (added), broadcast to [batch, heads, queries, keys]. A row that
    sees nothing is 0. Returns [batch, heads, queries, dim] in q's dtype.
    """
    queries, keys = q.shape[-2], k.shape[-2]
    grouped = q.shape[1] != k.shape[1]
    if queries == 1:
        is_causal = False  # the last position sees every key
    if mask is None and not window and (not is_causal or queries == keys):
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, scale=scale, enable_gqa=grouped
        )
    visible = is_visible(queries, keys, is_causal, window, q.device)
    merged = merge_masks(mask, visible, q.dtype)
    if grouped and q.is_cuda:  # its fast backends take a mask or groups, not both
        k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], 1) for each in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=merged, scale=scale, enable_gqa=grouped
    )


def merge_masks(mask: Tensor | None, visible: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """One mask, as torch takes it, of a mask (bool or float) and a map of what is visible."""
    if mask is None or visible is None:
        return visible if mask is None else mask
    if mask.dtype == torch.bool:
        return mask & visible
    return mask.to(dtype).masked_fill(~visible, float("-inf"))
