"""Operands of an epilogue: what the C functions take on trust, and how they read them."""

from collections.abc import Sequence
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
    check_bias(kernel, out, bias)
    check_extras(kernel, extras)


def check_bias(kernel: Takes, out: int, bias: Tensor | None) -> None:
    """The part of `check_operands` that is about the bias."""
    if (bias is not None) is not kernel.has_bias:
        raise _miscounted(kernel, "bias", int(bias is not None))
    if bias is None:
        return
    if bias.shape != (out,):
        raise misshapen("bias", bias, f"the weight has {out} rows")
    if bias.dtype is not kernel.dtype:
        raise DtypeMismatch(name="bias", dtype=bias.dtype, needed=kernel.dtype)


def check_extras(kernel: Takes, extras: Sequence[Tensor]) -> None:
    """The part of `check_operands` that is about the operands of the epilogue."""
    if len(extras) != kernel.extras:
        raise _miscounted(kernel, "extras", len(extras))
    for extra in extras:
        if extra.dtype is not kernel.dtype:
            name = "an operand of the epilogue"
            raise DtypeMismatch(name=name, dtype=extra.dtype, needed=kernel.dtype)


def _miscounted(kernel: Takes, name: str, count: int) -> ShapeMismatch:
    rule = f"the kernel takes bias={kernel.has_bias} and {kernel.extras} extras"
    return misshapen(name, torch.empty(count, device="meta"), rule)


def spread(extra: Tensor, y: Tensor) -> Tensor:
    """An operand of the epilogue as the kernel reads it: contiguous, of the shape of y."""
    return (extra if extra.shape == y.shape else extra.expand(y.shape)).contiguous()


def misshapen(name: str, tensor: Tensor, rule: str) -> ShapeMismatch:
    """The error of a tensor that breaks `rule`."""
    remedy = "Pass the tensors of the Lowering that this handle came with"
    return ShapeMismatch(name=name, shape=tuple(tensor.shape), rule=rule, remedy=remedy)
