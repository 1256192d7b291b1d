"""The operators sparsefx_cpp::*_attention: a generated library called by ctypes.

An operator is registered once; which kernel runs is its `handle` argument. Each first asks
`attention.route` whether the call is short enough for dense attention.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from sparsefx.attention.operands import (
    check_dtype,
    check_operands,
    check_shape,
    checked_tables,
    misshapen,
)
from sparsefx.attention.operators import SCHEMAS, attention_output
from sparsefx.attention.route import dense_if_short
from sparsefx.attention.spec import DENOMINATORS
from sparsefx.codegen.cpp.attention.problem import Problem, problem
from sparsefx.codegen.cpp.build import opened
from sparsefx.errors import KernelNotFound

_LIBRARY = torch.library.Library("sparsefx_cpp", "FRAGMENT")


class Loaded(NamedTuple):
    """A library in this process: its function, and what the function was specialised to."""

    run: Callable[..., int]
    method: str
    dtype: torch.dtype
    dim: int
    block_q: int
    block_k: int
    order: str
    mask: str


class Seen(NamedTuple):
    """What every operator takes first: the operands of dense attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    is_causal: bool
    scale: float
    window: int


@functools.cache
def load(handle: str) -> Loaded:
    """The library that `build` named `handle`. Raises KernelNotFound."""
    found = opened(handle, "sparsefx_attention")
    run = found.sparsefx_attention
    run.argtypes, run.restype = [ctypes.POINTER(Problem)], ctypes.c_int32
    text = (ctypes.c_char * 256).in_dll(found, "sparsefx_made_for").value.decode()
    made = dict(word.split("=") for word in text.split())
    return Loaded(
        run,
        method=made["method"],
        dtype=getattr(torch, made["dtype"]),
        dim=int(made["dim"]),
        block_q=int(made["block_q"]),
        block_k=int(made["block_k"]),
        order=made["order"],
        mask=made["mask"],
    )


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
    dense_below: int,
    calibrated: int,
    handle: str,
) -> Tensor:
    """`attention.meaning.skip_softmax_attention` by the library `handle`. No gradient.

    q [batch, heads, queries, dim]; k, v [batch, kv_heads, keys, dim]; all float32, bfloat16 or
    float16. Result: `attention.operators.attention_output`.
    Raises ShapeMismatch, DtypeMismatch, KernelNotFound.
    """
    seen = Seen(q, k, v, mask, is_causal, scale, window)
    dense = dense_if_short(*seen, dense_below, calibrated)
    if dense is not None:
        return dense
    return _skip_softmax(seen, prefill, decode, block_q, block_k, order, handle, None)


def _skip_softmax(
    seen: Seen,
    prefill: Tensor,
    decode: Tensor,
    block_q: int,
    block_k: int,
    order: str,
    handle: str,
    count: Tensor | None,
) -> Tensor:
    kernel = _checked(handle, "skip_softmax", seen)
    _check_options(kernel, block_q=block_q, block_k=block_k, order=order)
    factor = decode if seen.q.shape[2] == 1 else prefill
    check_shape("factor", factor, (seen.q.shape[1],))
    check_dtype("factor", factor, torch.float32)
    return _run(kernel, seen, count, factor=factor.contiguous())


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
    """As `skip_softmax_attention`, for `attention.meaning.block_attention`."""
    seen = Seen(q, k, v, mask, is_causal, scale, window)
    dense = dense_if_short(*seen, dense_below, calibrated)
    return _block(seen, keep, block_q, block_k, handle, None) if dense is None else dense


def _block(
    seen: Seen, keep: Tensor, block_q: int, block_k: int, handle: str, count: Tensor | None
) -> Tensor:
    kernel = _checked(handle, "block", seen)
    _check_options(kernel, block_q=block_q, block_k=block_k)
    batch, heads, queries, _ = seen.q.shape
    tiles = -(-seen.k.shape[2] // block_k)
    check_shape("keep", keep, (batch, heads, -(-queries // block_q), tiles), leading=2)
    check_dtype("keep", keep, torch.bool)
    return _run(kernel, seen, count, keep=keep.contiguous())


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
    dense_below: int,
    calibrated: int,
    handle: str,
) -> Tensor:
    """As `skip_softmax_attention`, for `attention.meaning.theta_attention`."""
    seen = Seen(q, k, v, mask, is_causal, scale, window)
    dense = dense_if_short(*seen, dense_below, calibrated)
    if dense is not None:
        return dense
    options = (topk, placement, denominator, v_mean)
    return _theta(seen, lengths, theta, lost, *options, handle, None)


def _theta(
    seen: Seen,
    lengths: Tensor,
    theta: Tensor,
    lost: Tensor | None,
    topk: int,
    placement: str,
    denominator: str,
    v_mean: bool,
    handle: str,
    count: Tensor | None,
) -> Tensor:
    kernel = _checked(handle, "theta", seen)
    lengths, theta, lost = checked_tables(lengths, theta, lost, seen.q.shape[1])
    known = "none" if denominator == "offline" and lost is None else denominator
    return _run(
        kernel,
        seen,
        count,
        lengths=lengths,
        theta=theta,
        lost=lost,
        points=lengths.numel(),
        topk=topk,
        is_post=placement == "post",
        denominator=DENOMINATORS.index(known),
        v_mean=v_mean,
    )


def _run(kernel: Loaded, seen: Seen, count: Tensor | None, **method: Tensor | int | None) -> Tensor:
    """Calls the library with the operands of every method and those of its own."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in seen[:3])
    mask = seen.mask
    if mask is not None and mask.dtype is not torch.bool:
        mask = _in_float32(mask)
    out = attention_output(q, k, v)
    filled = problem(q, k, v, mask, seen.is_causal, seen.scale, seen.window, out, count)
    for name, value in method.items():
        setattr(filled, name, value.data_ptr() if isinstance(value, Tensor) else value)
    keep = method.get("keep")
    if isinstance(keep, Tensor):
        spread = keep.expand(q.shape[0], q.shape[1], *keep.shape[2:])
        filled.keep_stride = spread.stride()[:3]
    if out.numel() and kernel.run(filled):
        raise MemoryError("no memory for the tiles that a sparse attention works on")
    return out


def _in_float32(mask: Tensor) -> Tensor:
    """The mask in float32, what is expanded converted once: `to` would write out the expansion."""
    if mask.dtype is torch.float32:
        return mask
    once = mask[tuple(slice(None) if step else slice(1) for step in mask.stride())]
    return once.to(torch.float32).expand(mask.shape)


# The operands of an operator have no common type.
def run_counted(op: OpOverload, *operands: Any) -> tuple[Tensor, Tensor]:
    """The result of one of the operators, never dense, and how much of it was computed.

    op, operands: as a graph calls it. The count is int32 [batch, heads, row tiles]: key tiles whose
    exponentials and product with V were computed; of theta_attention, [batch, heads, queries]:
    elements of the row above its threshold.
    """
    values = dict(zip((each.name for each in op._schema.arguments), operands, strict=True))
    seen = Seen(*(values.pop(name) for name in Seen._fields))
    del values["dense_below"], values["calibrated"]
    batch, heads, queries, _ = seen.q.shape
    rows = 1 if queries == 1 else -(-queries // values.get("block_q", 1))
    count = torch.zeros(batch, heads, rows, dtype=torch.int32)
    run = _COUNTED[op._schema.name.partition("::")[2]]
    return run(seen, **values, count=count), count


def _checked(handle: str, method: str, seen: Seen) -> Loaded:
    """The kernel, if it was made for operands like these: the C function takes them on trust."""
    kernel = load(handle)
    if kernel.method != method:
        raise KernelNotFound(handle=handle)
    check_operands(*seen[:4], kernel.dim, kernel.dtype)
    _check_mask(kernel, seen.mask)
    return kernel


def _check_mask(kernel: Loaded, mask: Tensor | None) -> None:
    kind = "none" if mask is None else "bool" if mask.dtype == torch.bool else "float"
    if mask is not None and kind != kernel.mask:
        needed = torch.bool if kernel.mask == "bool" else torch.float32
        check_dtype("mask", mask, needed)
    if kind != kernel.mask:
        raise misshapen("mask", torch.empty(0), f"the kernel was built for a {kernel.mask} mask")


def _check_options(kernel: Loaded, **given: int | str) -> None:
    for name, value in given.items():
        built = getattr(kernel, name)
        if value != built:
            rule = f"the kernel was built for {name}={built}, not {value}"
            raise misshapen(name, torch.empty(0), rule)


_COUNTED: dict[str, Callable[..., Tensor]] = {
    "skip_softmax_attention": _skip_softmax,
    "block_attention": _block,
    "theta_attention": _theta,
}
for _name, _function in (
    ("skip_softmax_attention", skip_softmax_attention),
    ("block_attention", block_attention),
    ("theta_attention", theta_attention),
):
    _LIBRARY.define(
        f"{_name}({SCHEMAS[_name]}, int dense_below, int calibrated, str handle) -> Tensor"
    )
    _LIBRARY.impl(_name, _function, "CPU")
    torch.library.register_fake(f"sparsefx_cpp::{_name}", attention_output, lib=_LIBRARY)
