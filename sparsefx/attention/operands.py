"""Checks of what an attention kernel is called with: kernels read their operands on trust."""

import torch
from torch import Tensor

from sparsefx.errors import DtypeMismatch, ShapeMismatch

_REMEDY = "Pass the operands of the node that this handle was built for"


def check_operands(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, head_dim: int, dtype: torch.dtype
) -> None:
    """Raises unless q, k, v and mask are as `attention.dense` says, of this head size and dtype.

    ShapeMismatch for a shape, also of a mask that does not broadcast to [batch, heads, queries,
    keys]; DtypeMismatch for q, k or v. Any dtype of the mask passes.
    """
    for name, operand in (("q", q), ("k", k), ("v", v)):
        if operand.dim() != 4 or operand.shape[-1] != head_dim:
            raise misshapen(name, operand, f"it must be [batch, heads, length, {head_dim}]")
        check_dtype(name, operand, dtype)
    if k.shape[0] != q.shape[0] or not k.shape[1] or q.shape[1] % k.shape[1]:
        raise misshapen("k", k, f"it does not go with q of {tuple(q.shape)}")
    check_shape("v", v, tuple(k.shape))
    if mask is not None:
        shape = (*q.shape[:3], k.shape[2])
        sizes = zip(reversed(mask.shape), reversed(shape), strict=False)
        if mask.dim() > 4 or any(size not in (1, whole) for size, whole in sizes):
            raise misshapen("mask", mask, f"it must broadcast to {shape}")


def checked_tables(
    lengths: Tensor, theta: Tensor, lost: Tensor | None, heads: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tables of theta attention in contiguous memory.

    lengths: int64 [points], at least one; theta, lost: float32 [heads, points]. Raises
    ShapeMismatch, DtypeMismatch.
    """
    if lengths.dim() != 1 or not lengths.numel():
        raise misshapen("lengths", lengths, "it must be [points], at least one")
    check_dtype("lengths", lengths, torch.int64)
    for name, table in (("theta", theta), ("lost", lost)):
        if table is not None:
            check_shape(name, table, (heads, lengths.numel()))
            check_dtype(name, table, torch.float32)
    return lengths.contiguous(), theta.contiguous(), None if lost is None else lost.contiguous()


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], leading: int = 0) -> None:
    """Raises ShapeMismatch unless the shape is this, where the first `leading` may also be 1."""
    fits = tensor.dim() == len(shape) and all(
        size == whole or (axis < leading and size == 1)
        for axis, (size, whole) in enumerate(zip(tensor.shape, shape, strict=True))
    )
    if not fits:
        raise misshapen(name, tensor, f"it must be {shape}")


def check_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Raises DtypeMismatch unless the dtype is this."""
    if tensor.dtype is not dtype:
        raise DtypeMismatch(name=name, dtype=tensor.dtype, needed=dtype)


def misshapen(name: str, tensor: Tensor, rule: str) -> ShapeMismatch:
    """The error for an operand whose shape breaks `rule`."""
    return ShapeMismatch(name=name, shape=tuple(tensor.shape), rule=rule, remedy=_REMEDY)
