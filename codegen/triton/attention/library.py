"""The operators of the attention kernels with many queries, in the library sparsefx_triton.

`skip_softmax_prefill` and `block_attention` take what the dialect's operators take, then
`dense_below`, `calibrated` (`sparsefx.attention.route`) and the handle of a kernel. On CPU tensors
they run the plain meaning unless Triton's interpreter is on, as the linear operators do.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sparsefx.attention import meaning
from sparsefx.attention.operators import SCHEMAS, attention_output
from sparsefx.attention.route import dense_if_short
from sparsefx.codegen.triton.attention.variant import AttentionVariant
from sparsefx.codegen.triton.library import launches
from sparsefx.errors import InvalidHandle, ShapeMismatch

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

    A single query, which the kernel was not made for, runs the meaning: it is one row of scores.
    Raises InvalidHandle, DtypeMismatch, ShapeMismatch; KernelBuildFailed where Triton refuses.
    """
    seen = (is_causal, scale, window)
    short = dense_if_short(q, k, v, mask, *seen, dense_below, calibrated)
    if short is not None:
        return short
    if q.shape[2] == 1 or not launches(q):
        tile = (block_q, block_k, order)
        return meaning.skip_softmax_attention(q, k, v, mask, prefill, decode, *seen, *tile)
    from sparsefx.codegen.triton.attention import prefill as kernels  # imports Triton

    options = (("order", order),)
    check_call(
        handle, "skip_prefill", (block_q, block_k), options, q, k, v, mask, is_causal, window
    )
    if prefill.shape != (q.shape[1],):
        raise ShapeMismatch(
            name="prefill",
            shape=tuple(prefill.shape),
            rule=f"there are {q.shape[1]} heads",
            remedy="Calibrate this model",
        )
    return kernels.skip_softmax(handle, q, k, v, mask, prefill, scale, window)


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
    if keep.shape[2:] != tiles or any(
        size not in (1, whole) for size, whole in zip(keep.shape[:2], q.shape[:2], strict=True)
    ):
        raise ShapeMismatch(
            name="keep",
            shape=tuple(keep.shape),
            rule=f"the operands have [batch, heads, {tiles[0]}, {tiles[1]}] tiles",
            remedy="Make the map from the lengths of this call",
        )
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
) -> None:
    """Raises InvalidHandle, DtypeMismatch, ShapeMismatch unless `handle` is made for this call."""
    variant = AttentionVariant.parse(handle)
    if (variant.kernel, variant.tile, variant.options) != (kernel, tile, options):
        raise InvalidHandle(handle=handle, rule="the call is of another kernel, tile or order")
    variant.check(q, k, v, mask, is_causal, window)


register("skip_softmax_prefill", "skip_softmax_attention", skip_softmax_prefill)
register("block_attention", "block_attention", block_attention)

SKIP_PREFILL = torch.ops.sparsefx_triton.skip_softmax_prefill.default
BLOCK = torch.ops.sparsefx_triton.block_attention.default
