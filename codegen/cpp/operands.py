"""Operands of an epilogue: what the C functions take on trust, and how they read them."""

import ctypes
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from sparsefx.errors import DtypeMismatch, ShapeMismatch


class Takes(Protocol):
    """A loaded kernel: the type of its operands, and which of them it was specialised to."""

    @property
    def dtype(self) -> torch.dtype:
        """Of bias and extras."""
        ...

    @property
    def has_bias(self) -> bool:
        """Whether it takes a bias."""
        ...

    @property
    def extras(self) -> int:
        """How many operands its epilogue has."""
        ...


def check_operands(kernel: Takes, out: int, bias: Tensor | None, extras: Sequence[Tensor]) -> None:
    """Whether bias and extras are what `kernel` takes for a weight of `out` rows.

    Raises ShapeMismatch, DtypeMismatch.
    """
    if (bias is not None) is not kernel.has_bias:
        raise _miscounted(kernel, "bias", int(bias is not None))
    if bias is not None:
        _check_bias(kernel, out, bias)
    if len(extras) != kernel.extras:
        raise _miscounted(kernel, "extras", len(extras))
    for extra in extras:
        if extra.dtype is not kernel.dtype:
            name = "an operand of the epilogue"
            raise DtypeMismatch(name=name, dtype=extra.dtype, needed=kernel.dtype)


def _check_bias(kernel: Takes, out: int, bias: Tensor) -> None:
    if bias.shape != (out,):
        raise misshapen("bias", bias, f"the weight has {out} rows")
    if bias.dtype is not kernel.dtype:
        raise DtypeMismatch(name="bias", dtype=bias.dtype, needed=kernel.dtype)


def check_memory(name: str, tensors: Iterable[Tensor | None]) -> None:
    """Whether all that a call reads is there: the storage of a tensor may have been cut or freed.

    Raises ShapeMismatch.
    """
    for each in tensors:
        if each is not None and _end(each) > each.untyped_storage().nbytes():
            raise misshapen(name, each, "it reaches beyond the end of its storage")


def _end(tensor: Tensor) -> int:
    """The byte of its storage where its last number ends; 0 if it has none."""
    count = tensor.numel()
    if not tensor.is_contiguous():
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        count = 1 + sum((int(size) - 1) * stride for size, stride in steps) if count else 0
    return (int(tensor.storage_offset()) + count) * tensor.element_size() if count else 0


def _miscounted(kernel: Takes, name: str, count: int) -> ShapeMismatch:
    rule = f"the kernel takes bias={kernel.has_bias} and {kernel.extras} extras"
    return misshapen(name, torch.empty(count, device="meta"), rule)


def spread(extra: Tensor, y: Tensor) -> Tensor:
    """An operand of the epilogue as the kernel reads it: contiguous, of the shape of y."""
    return (extra if extra.shape == y.shape else extra.expand(y.shape)).contiguous()


def pointers(operands: Sequence[Tensor]) -> "ctypes.Array[ctypes.c_void_p]":
    """Where operands of an epilogue lie, as an array of C."""
    return (ctypes.c_void_p * len(operands))(*[each.data_ptr() for each in operands])


def misshapen(name: str, tensor: Tensor, rule: str) -> ShapeMismatch:
    """The error of a tensor that breaks `rule`."""
    remedy = "Pass the tensors of the Lowering that this handle came with"
    return ShapeMismatch(name=name, shape=tuple(tensor.shape), rule=rule, remedy=remedy)
