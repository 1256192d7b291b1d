"""The operator sparsefx_cpp::linear: a generated library called by ctypes.

The operator is registered once; which kernel runs is its `handle` argument. Registered by
`Library.define/impl`: the decorator `custom_op` would cost three times as much a call.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparsefx.codegen.cpp.build import opened
from sparsefx.errors import DtypeMismatch, ShapeMismatch
from sparsefx.ops import linear_output
from sparsefx.target import LINEAR_SCHEMA

_LIBRARY = torch.library.Library("sparsefx_cpp", "DEF")
_LIBRARY.define(LINEAR_SCHEMA)


class Loaded(NamedTuple):
    """A library in this process: its function, and what the function was specialised to."""

    run: Callable[..., int]
    dtype: torch.dtype
    has_bias: bool
    extras: int
    n: int
    m: int
    index_bits: int
    of_w: int

    def row_bytes(self, in_features: int) -> int:
        """Bytes of the keys of a row: indices of its values, or one bit a column."""
        bits = in_features // self.m * self.n * self.index_bits if self.index_bits else in_features
        return (bits + 7) // 8


@functools.cache
def load(handle: str) -> Loaded:
    """The library that `build` named `handle`. Raises KernelNotFound."""
    found = opened(handle, "sparsefx_linear")
    run = found.sparsefx_linear
    run.argtypes = [*[ctypes.c_void_p] * 7, *[ctypes.c_int64] * 5, ctypes.c_int32]
    run.restype = ctypes.c_int32
    has_bias, *numbers = (ctypes.c_int32 * 6).in_dll(found, "sparsefx_numbers")
    dtype = (ctypes.c_char * 16).in_dll(found, "sparsefx_dtype").value.decode()
    return Loaded(run, getattr(torch, dtype), bool(has_bias), *numbers)


def linear(
    x: Tensor,
    packed: Sequence[Tensor],
    bias: Tensor | None,
    extras: Sequence[Tensor],
    handle: str,
    features: int,
) -> Tensor:
    """epilogue(x W^T + bias) by the library `handle`.

    x [..., in]; packed: `formats.PackedBitmap`, or values and index of `formats.PackedNM`, where
    for kernels that read no indices, index is uint8 [out, ceil(in/8)], one bit a column, 1 = kept,
    lowest bit = lowest column; bias [out]; extras [..., features].
    Returns [..., features], contiguous, x's dtype. No gradient.
    Raises ShapeMismatch, DtypeMismatch, KernelNotFound.
    """
    kernel = load(handle)
    values, keys, *row_ptr = packed
    if keys.shape[0] != features * kernel.of_w:
        raise _misshapen("index or bits", keys, f"the result has {features} features")
    if row_ptr:
        _check_bitmap(keys, row_ptr[0])
        return _run(kernel, x, values, keys, row_ptr[0].contiguous(), bias, extras)
    if values.numel() * kernel.m != keys.shape[0] * x.shape[-1] * kernel.n:
        rule = f"{kernel.n}:{kernel.m} of [{keys.shape[0]}, {x.shape[-1]}] has another count"
        raise _misshapen("values", values, rule)
    return _run(kernel, x, values, keys, None, bias, extras)


def _check_bitmap(bits: Tensor, row_ptr: Tensor) -> None:
    if row_ptr.shape[0] != bits.shape[0] + 1 or row_ptr.dtype != torch.int32:
        raise _misshapen("row_ptr", row_ptr, f"it must be int32 [{bits.shape[0] + 1}]")


def _run(
    kernel: Loaded,
    x: Tensor,
    values: Tensor,
    keys: Tensor,
    row_ptr: Tensor | None,
    bias: Tensor | None,
    extras: Sequence[Tensor],
) -> Tensor:
    _check(kernel, x, values, keys, bias, extras)
    out = keys.shape[0]
    y = linear_output(x, out // kernel.of_w)
    if not y.numel():
        return y
    x, values, keys = x.contiguous(), values.contiguous(), keys.contiguous()
    bias = None if bias is None else bias.contiguous()
    extras = [_spread(extra, y) for extra in extras]
    failed = kernel.run(
        x.data_ptr(),
        values.data_ptr(),
        keys.data_ptr(),
        None if row_ptr is None else row_ptr.data_ptr(),
        None if bias is None else bias.data_ptr(),
        (ctypes.c_void_p * len(extras))(*[extra.data_ptr() for extra in extras]),
        y.data_ptr(),
        y.numel() // y.shape[-1],
        x.shape[-1],
        out,
        keys.shape[1],
        values.numel(),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("no memory for the copies that a sparse linear works on")
    return y


def _check(
    kernel: Loaded,
    x: Tensor,
    values: Tensor,
    keys: Tensor,
    bias: Tensor | None,
    extras: Sequence[Tensor],
) -> None:
    """Everything that the C function takes on trust."""
    for tensor, dtype in ((x, kernel.dtype), (values, kernel.dtype), (keys, torch.uint8)):
        if tensor.dtype is not dtype:
            name = "x" if tensor is x else "values" if tensor is values else "index or bits"
            raise DtypeMismatch(name=name, dtype=tensor.dtype, needed=dtype)
    if keys.shape[1] != kernel.row_bytes(x.shape[-1]):
        rule = f"its last size must fit the {keys.shape[1]} bytes of index or bits of a row"
        raise _misshapen("x", x, rule)
    if (bias is not None) is not kernel.has_bias or len(extras) != kernel.extras:
        rule = f"the kernel takes bias={kernel.has_bias} and {kernel.extras} extras"
        raise _misshapen("extras", x.new_empty(len(extras)), rule)
    if bias is not None and bias.shape != keys.shape[:1]:
        raise _misshapen("bias", bias, f"the weight has {keys.shape[0]} rows")
    for operand in extras if bias is None else (bias, *extras):
        if operand.dtype is not kernel.dtype:
            name = "bias" if operand is bias else "an operand of the epilogue"
            raise DtypeMismatch(name=name, dtype=operand.dtype, needed=kernel.dtype)


def _spread(extra: Tensor, y: Tensor) -> Tensor:
    """An operand of the epilogue as the kernel reads it: contiguous, of the shape of y."""
    return (extra if extra.shape == y.shape else extra.expand(y.shape)).contiguous()


def _misshapen(name: str, tensor: Tensor, rule: str) -> ShapeMismatch:
    remedy = "Pass the tensors of the Lowering that this handle came with"
    return ShapeMismatch(name=name, shape=tuple(tensor.shape), rule=rule, remedy=remedy)


_LIBRARY.impl("linear", linear, "CPU")
torch.library.register_fake(
    "sparsefx_cpp::linear",
    lambda x, packed, bias, extras, handle, features: linear_output(x, features),
    lib=_LIBRARY,
)
