"""The operator sparsefx_cpp::linear, and its half in Python: a generated library called by ctypes.

The operator is registered once; which kernel runs is its `handle` argument. The half in C++
(operator.py) takes calls where all is loaded and lies as a kernel reads it. Here the rest ends up:
kernels that are not loaded yet, strided tensors, mistakes.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparsefx.codegen.cpp import block_call, library
from sparsefx.codegen.cpp.build import opened
from sparsefx.codegen.cpp.operands import (
    check_memory,
    check_operands,
    misshapen,
    pointers,
    spread,
)
from sparsefx.codegen.cpp.operator import OPERATOR
from sparsefx.errors import DtypeMismatch
from sparsefx.ops import linear_output
from sparsefx.target import LINEAR_SCHEMA

_LIBRARY = torch.library.Library("sparsefx_cpp", "DEF")
_LIBRARY.define(LINEAR_SCHEMA)


class Loaded(NamedTuple):
    """A library in this process: its function, and what the function was specialised to."""

    run: Callable[..., int]
    dtype: torch.dtype
    stored: torch.dtype
    has_bias: bool
    extras: int
    n: int
    m: int
    index_bits: int
    of_w: int
    has_scales: bool
    group: int

    def row_bytes(self, in_features: int) -> int:
        """Bytes of the keys of a row: indices of its values, or one bit a column."""
        bits = in_features // self.m * self.n * self.index_bits if self.index_bits else in_features
        return (bits + 7) // 8

    def value_count(self, out: int, in_features: int) -> int:
        """Values of an N:M weight, or the bytes of 4-bit ones."""
        of_row = in_features // self.m * self.n
        return out * ((of_row + 1) // 2 if self.stored is torch.uint8 else of_row)

    def groups(self, in_features: int) -> int:
        """Scales of a row."""
        return -(-in_features // self.group) if self.group else 1


@functools.cache
def load(handle: str) -> Loaded:
    """The library that `build` named `handle`. Raises KernelNotFound."""
    found = opened(handle, "sparsefx_linear")
    OPERATOR.add(handle, found)
    run = library.function(found, "sparsefx_linear", pointers=8, sizes=5)
    has_bias, extras, n, m, index_bits, of_w, scaled, group = library.numbers(found, 8)
    dtype, stored = library.dtype(found), library.dtype(found, "sparsefx_stored")
    sizes = (extras, n, m, index_bits, of_w)
    return Loaded(run, dtype, stored, bool(has_bias), *sizes, bool(scaled), group)


def linear(
    x: Tensor,
    packed: Sequence[Tensor],
    bias: Tensor | None,
    extras: Sequence[Tensor],
    handle: str,
    features: int,
) -> Tensor:
    """epilogue(x W^T + bias) by the library `handle`.

    x [..., in]; packed: `packing.Packing` of layout "bitmap" or "nm", where for kernels that read
    no indices, index is uint8 [out, ceil(in/8)], one bit a column, 1 = kept, lowest bit = lowest
    column, or of layout "block"; bias [out]; extras [..., features].
    Returns [..., features], contiguous, x's dtype. No gradient.
    Raises ShapeMismatch, DtypeMismatch, KernelNotFound.
    """
    check_memory("x", [x])
    check_memory("packed", packed)
    check_memory("an operand of the epilogue", [bias, *extras])
    if handle.startswith(block_call.HANDLE):
        return block_call.linear(x, packed, bias, extras, handle, features)
    kernel = load(handle)
    values, keys, row_ptr, scales = _parts(kernel, packed)
    _check(kernel, x, values, keys, row_ptr, scales, features)
    check_operands(kernel, keys.shape[0], bias, extras)
    y = linear_output(x, features)
    if not y.numel():
        return y
    laid = [each if each is None else each.contiguous() for each in (row_ptr, scales, bias)]
    laid = [x.contiguous(), values.contiguous(), keys.contiguous(), *laid]
    operands = [spread(extra, y) for extra in extras]
    failed = kernel.run(
        *[None if each is None else each.data_ptr() for each in laid],
        pointers(operands),
        y.data_ptr(),
        y.numel() // features,
        x.shape[-1],
        *keys.shape,
        values.numel(),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("no memory for the copies that a sparse linear works on")
    return y


def _parts(
    kernel: Loaded, packed: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """values, keys, row_ptr and scales."""
    if len(packed) != 2 + (not kernel.n) + kernel.has_scales:
        row_ptr = "" if kernel.n else ", row_ptr"
        rule = f"the kernel reads values, keys{row_ptr}{', scales' * kernel.has_scales}"
        raise misshapen("packed", packed[0].new_empty(len(packed)), rule)
    scales = packed[-1] if kernel.has_scales else None
    return packed[0], packed[1], None if kernel.n else packed[2], scales


def _check(
    kernel: Loaded,
    x: Tensor,
    values: Tensor,
    keys: Tensor,
    row_ptr: Tensor | None,
    scales: Tensor | None,
    features: int,
) -> None:
    """What the C function takes on trust about x and the weight."""
    if x.dtype is not kernel.dtype:
        raise DtypeMismatch(name="x", dtype=x.dtype, needed=kernel.dtype)
    if values.dtype is not kernel.stored:
        raise DtypeMismatch(name="values", dtype=values.dtype, needed=kernel.stored)
    if keys.dtype is not torch.uint8:
        raise DtypeMismatch(name="index or bits", dtype=keys.dtype, needed=torch.uint8)
    (out, row_bytes), width = keys.shape, x.shape[-1]
    if out != features * kernel.of_w:
        raise misshapen("index or bits", keys, f"the result has {features} features")
    if row_ptr is None:
        if values.numel() != kernel.value_count(out, width):
            rule = f"{kernel.n}:{kernel.m} of [{out}, {width}] has another count"
            raise misshapen("values", values, rule)
    elif row_ptr.shape[0] != out + 1 or row_ptr.dtype is not torch.int32:
        raise misshapen("row_ptr", row_ptr, f"it must be int32 [{out + 1}]")
    if row_bytes != kernel.row_bytes(width):
        rule = f"its last size must fit the {row_bytes} bytes of index or bits of a row"
        raise misshapen("x", x, rule)
    if scales is not None:
        _check_scales(kernel, scales, out, width)


def _check_scales(kernel: Loaded, scales: Tensor, out: int, width: int) -> None:
    if scales.dtype is not kernel.dtype:
        raise DtypeMismatch(name="scales", dtype=scales.dtype, needed=kernel.dtype)
    if scales.shape != (out, kernel.groups(width)):
        rule = f"the weight has {kernel.groups(width)} in each of {out} rows"
        raise misshapen("scales", scales, rule)


_LIBRARY.impl("linear", linear, "CPU")
torch.library.register_fake(
    "sparsefx_cpp::linear",
    lambda x, packed, bias, extras, handle, features: linear_output(x, features),
    lib=_LIBRARY,
)
