"""The operators of one query: sparsefx_triton::skip_softmax_decode and ::theta_decode.

They take the arguments of the dialect's operator, then dense_below, calibrated
(`attention.route`) and the handle. Where no kernel can run they compute the plain meaning
(`codegen.triton.library`).
"""

import torch
from torch import Tensor

from sparsefx.attention import meaning
from sparsefx.attention.route import dense_if_short
from sparsefx.codegen.triton.attention.library import check_call, register
from sparsefx.codegen.triton.library import launches


def skip_softmax_decode(
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
    """`meaning.skip_softmax_attention` of one query by the kernels that `handle` names.

    Tile and order are in the handle. Raises InvalidHandle, DtypeMismatch, ShapeMismatch,
    KernelBuildFailed.
    """
    seen = (is_causal, scale, window)
    dense = dense_if_short(q, k, v, mask, *seen, dense_below, calibrated)
    if dense is not None:
        return dense
    if not launches(q):
        tile = (block_q, block_k, order)
        return meaning.skip_softmax_attention(q, k, v, mask, prefill, decode, *seen, *tile)
    from sparsefx.codegen.triton.attention import decode_skip  # imports Triton, which is slow

    operands, options = (q, k, v, mask, is_causal, window), (("order", order),)
    check_call(handle, "decode_skip", (block_q, block_k), options, *operands)
    return decode_skip.run_counted(handle, q, k, v, mask, decode, scale, window)[0]


def theta_decode(
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
    dense_below: int,
    calibrated: int,
    handle: str,
) -> Tensor:
    """`meaning.theta_attention` of one query by the kernels that `handle` names.

    Placement, denominator and V-mean are in the handle. Raises InvalidHandle, DtypeMismatch,
    ShapeMismatch, KernelBuildFailed.
    """
    seen = (is_causal, scale, window)
    dense = dense_if_short(q, k, v, mask, *seen, dense_below, calibrated)
    if dense is not None:
        return dense
    if not launches(q):
        given = (q, k, v, mask, lengths, theta, lost)
        return meaning.theta_attention(*given, *seen, topk, placement, denominator, v_mean)
    from sparsefx.codegen.triton.attention import theta_decode as kernels  # imports Triton

    options = theta_options(placement, denominator, v_mean)
    check_call(handle, "theta_decode", (0, 0), options, q, k, v, mask, is_causal, window)
    tables = (lengths, theta, lost)
    return kernels.theta(handle, q, k, v, mask, tables, scale, window, topk)


def theta_options(placement: str, denominator: str, v_mean: bool) -> tuple[tuple[str, str], ...]:
    """The options of a theta_decode kernel."""
    chosen = {"placement": placement, "denominator": denominator, "v_mean": str(int(v_mean))}
    return tuple(chosen.items())


register("skip_softmax_decode", "skip_softmax_attention", skip_softmax_decode)
register("theta_decode", "theta_attention", theta_decode)

SKIP_SOFTMAX_DECODE = torch.ops.sparsefx_triton.skip_softmax_decode.default
THETA_DECODE = torch.ops.sparsefx_triton.theta_decode.default
