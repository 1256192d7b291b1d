"""Generated libraries of block-sparse linears: loaded and called by ctypes."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparsefx.codegen.cpp import library
from sparsefx.codegen.cpp.build import opened
from sparsefx.codegen.cpp.operands import check_operands, misshapen, pointers, spread
from sparsefx.codegen.cpp.operator import OPERATOR
from sparsefx.errors import DtypeMismatch
from sparsefx.ops import linear_output

HANDLE = "block_"
"""What the handles of these libraries begin with."""


class Loaded(NamedTuple):
    """A library in this process: its function, and what the function was specialised to."""

    run: Callable[..., int]
    dtype: torch.dtype
    has_bias: bool
    extras: int
    rows: int
    cols: int
    of_w: int


@functools.cache
def load(handle: str) -> Loaded:
    """The library that `build` named `handle`. Raises KernelNotFound."""
    found = opened(handle, "sparsefx_block_linear")
    OPERATOR.add(handle, found)
    run = library.function(found, "sparsefx_block_linear", pointers=7, sizes=3)
    has_bias, *sizes = library.numbers(found, 5)
    return Loaded(run, library.dtype(found), bool(has_bias), *sizes)


def linear(
    x: Tensor,
    packed: Sequence[Tensor],
    bias: Tensor | None,
    extras: Sequence[Tensor],
    handle: str,
    features: int,
) -> Tensor:
    """epilogue(x W^T + bias) by the library `handle`; packed: `formats.PackedBlock`.

    Arguments, result and errors as `call.linear`.
    """
    kernel = load(handle)
    out = features * kernel.of_w
    _check(kernel, x, packed, out)
    check_operands(kernel, out, bias, extras)
    y = linear_output(x, features)
    if not y.numel():
        return y
    tensors = [each.contiguous() for each in (x, *packed)]
    bias = None if bias is None else bias.contiguous()
    operands = [spread(extra, y) for extra in extras]
    failed = kernel.run(
        *[each.data_ptr() for each in tensors],
        None if bias is None else bias.data_ptr(),
        pointers(operands),
        y.data_ptr(),
        y.numel() // features,
        x.shape[-1],
        out,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("no memory for the copies that a sparse linear works on")
    return y


def _check(kernel: Loaded, x: Tensor, packed: Sequence[Tensor], out: int) -> None:
    """What the C function takes on trust about x and the weight."""
    values, columns, row_ptr = packed
    for name, tensor, dtype in (
        ("x", x, kernel.dtype),
        ("values", values, kernel.dtype),
        ("columns", columns, torch.int32),
        ("row_ptr", row_ptr, torch.int32),
    ):
        if tensor.dtype is not dtype:
            raise DtypeMismatch(name=name, dtype=tensor.dtype, needed=dtype)
    if x.shape[-1] % kernel.cols:
        raise misshapen("x", x, f"its last size must be a multiple of {kernel.cols}")
    if values.shape[1:] != (kernel.rows, kernel.cols) or len(values) != len(columns):
        rule = f"it must be [{len(columns)}, {kernel.rows}, {kernel.cols}]"
        raise misshapen("values", values, rule)
    if (len(row_ptr) - 1) * kernel.rows != out:
        raise misshapen("row_ptr", row_ptr, f"the result comes of {out} rows of W")
