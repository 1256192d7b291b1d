"""The C struct `Problem` of templates/problem.h, filled from tensors."""

import ctypes
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor


class Problem(ctypes.Structure):
    """What a call is about; the fields are explained in the template."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "v", "mask", "factor", "keep")),
        *((name, c_void_p) for name in ("lengths", "theta", "lost", "out", "count")),
        *((name, c_int64) for name in ("batch", "heads", "kv_heads", "queries", "keys")),
        *((name, c_int64 * 3) for name in ("q_stride", "k_stride", "v_stride")),
        ("mask_stride", c_int64 * 4),
        ("keep_stride", c_int64 * 3),
        *((name, c_int64) for name in ("window", "points", "topk")),
        ("scale", c_float),
        *((name, c_int32) for name in ("is_causal", "is_post", "denominator", "v_mean", "threads")),
    )


def problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    window: int,
    out: Tensor,
    count: Tensor | None,
) -> Problem:
    """The struct for operands that have been checked; it keeps no tensor alive."""
    batch, heads, queries, _ = q.shape
    filled = Problem(
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        out=out.data_ptr(),
        count=None if count is None else count.data_ptr(),
        batch=batch,
        heads=heads,
        kv_heads=k.shape[1],
        queries=queries,
        keys=k.shape[2],
        q_stride=q.stride()[:3],
        k_stride=k.stride()[:3],
        v_stride=v.stride()[:3],
        window=window,
        scale=scale,
        is_causal=is_causal,
        threads=torch.get_num_threads(),
    )
    if mask is not None:
        seen = mask.expand(batch, heads, queries, k.shape[2])
        filled.mask, filled.mask_stride = seen.data_ptr(), seen.stride()
    return filled
