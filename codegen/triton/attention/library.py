"""The operators of the attention kernels with many queries, in the library sparsefx_triton.

`skip_softmax_prefill` and `block_attention` take what the dialect's operators take, then
`dense_below`, `calibrated` (`sparsefx.attention.route`) and the handle of a kernel. On CPU tensors
they run the plain meaning unless Triton's interpreter is on, as the linear operators do.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from sparsefx.attention import meaning
from sparsefx.attention.operands import check_dtype, check_shape
from sparsefx.attention.operators import SCHEMAS, attention_output
from sparsefx.attention.route import dense_if_short
from sparsefx.codegen.triton.attention.variant import LARGEST_GROUP, AttentionVariant
from sparsefx.codegen.triton.library import launches
from sparsefx.errors import InvalidHandle

_LIBRARY = torch.library.Library("sparsefx_triton", "FRAGMENT")


def register(name: str, dialect: str, function: Callable[..., Tensor]) -> None:
    """Makes `function` the operator sparsefx_triton::`name` on CPU and CUDA.

    dialect: the operator whose arguments (`SCHEMAS`) it takes before the three of every kernel.
    """
    tail = "int dense_below, int calibrated, str handle"
    _LIBRARY.define(f"{name}({SCHEMAS[dialect]}, {tail}) -> Tensor")
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, function, device)
    torch.library.register_fake(f"sparsefx_triton::{name}", attention_output, lib=_LIBRARY)


def skip_softmax_prefill(
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
    dense_below: int,
    calibrated: int,
    handle: str,
) -> Tensor:
    """`meaning.skip_softmax_attention` by the kernel that `handle` names.

    A single query goes to the kernels of one query; where more heads share a KV head than these
    take, it runs the meaning. Raises InvalidHandle, DtypeMismatch, ShapeMismatch; KernelBuildFailed
    where Triton refuses.
    """
    qkv, seen = (q, k, v, mask), (is_causal, scale, window)
    short = dense_if_short(*qkv, *seen, dense_below, calibrated)
    if short is not None:
        return short
    tile, made, single = (block_q, block_k), None, q.shape[-2] == 1
    if launches(q):
        options = (("order", order),)
        made = check_call(handle, "skip_prefill", tile, options, *qkv, is_causal, window)
    if made is None or (single and made.group > LARGEST_GROUP):
        return meaning.skip_softmax_attention(*qkv, prefill, decode, *seen, *tile, order)
    from sparsefx.codegen.triton.attention import decode_skip  # imports Triton
    from sparsefx.codegen.triton.attention import prefill as kernels

    if single:
        one = replace(made, kernel="decode_skip").handle
        return decode_skip.run_counted(one, *qkv, decode, scale, window)[0]
    return kernels.skip_softmax(handle, *qkv, prefill, scale, window)


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
    dense_below: int,
    calibrated: int,
    handle: str,
) -> Tensor:
    """`meaning.block_attention` by the kernel that `handle` names; errors as above."""
    seen = (is_causal, scale, window)
    short = dense_if_short(q, k, v, mask, *seen, dense_below, calibrated)
    if short is not None:
        return short
    if not launches(q):
        return meaning.block_attention(q, k, v, mask, keep, *seen, block_q, block_k)
    from sparsefx.codegen.triton.attention import prefill as kernels  # imports Triton

    check_call(handle, "block", (block_q, block_k), (), q, k, v, mask, is_causal, window)
    tiles = (-(-q.shape[2] // block_q), -(-k.shape[2] // block_k))
    check_shape("keep", keep, (*q.shape[:2], *tiles), leading=2)
    check_dtype("keep", keep, torch.bool)
    return kernels.block_attention(handle, q, k, v, mask, keep, scale, window)


def check_call(
    handle: str,
    kernel: str,
    tile: tuple[int, int],
    options: tuple[tuple[str, str], ...],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    window: int,
) -> AttentionVariant:
    """What `handle` names, made for this call; else InvalidHandle, DtypeMismatch, ShapeMismatch."""
    variant = AttentionVariant.parse(handle)
    if (variant.kernel, variant.tile, variant.options) != (kernel, tile, options):
        raise InvalidHandle(handle=handle, rule="the call is of another kernel, tile or order")
    variant.check(q, k, v, mask, is_causal, window)
    return variant


register("skip_softmax_prefill", "skip_softmax_attention", skip_softmax_prefill)
register("block_attention", "block_attention", block_attention)

SKIP_PREFILL = torch.ops.sparsefx_triton.skip_softmax_prefill.default
BLOCK = torch.ops.sparsefx_triton.block_attention.default
