"""The CPU's kernel of convolutions: which it accepts, and the operator sparsefx_cpp::conv2d.

One library serves all windows, strides and sizes of a type: they are arguments of its function.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparsefx.codegen.cpp import build, emit, library
from sparsefx.codegen.cpp.build import opened
from sparsefx.codegen.cpp.isa import VECTOR_ISAS, Isa, best, named
from sparsefx.codegen.cpp.operands import misshapen
from sparsefx.convolutions import CONV_SCHEMA, ConvLowering, ConvSpec, conv_output
from sparsefx.errors import DtypeMismatch, KernelNotFound

WINDOWS = ((1, 1), (3, 3))
STRIDES, PADDINGS = (1, 2), (0, 1)

_LIBRARY = torch.library.Library("sparsefx_cpp", "FRAGMENT")
# Inductor gives x as it lies: the kernel reads contiguous and channels-last planes alike.
_LIBRARY.define(CONV_SCHEMA, tags=(torch.Tag.flexible_layout,))


class Loaded(NamedTuple):
    """A library in this process: its function, and the type of x, bias and y."""

    run: Callable[..., int]
    dtype: torch.dtype


@functools.cache
def load(handle: str) -> Loaded:
    """The library that `build` named `handle`. Raises KernelNotFound."""
    found = opened(handle, "sparsefx_conv2d")
    run = library.function(found, "sparsefx_conv2d", pointers=7, sizes=0)
    return Loaded(run, library.dtype(found))


@dataclass(frozen=True)
class CppConv:
    """A convolution with a sparse weight as a generated C function.

    `isa` forces an instruction set by name; None takes the best that this machine has.
    """

    isa: str | None = None
    name: str = "cpp_conv2d"

    def accepts(self, spec: ConvSpec) -> str | None:
        """None for yes, or the reason for no."""
        if spec.window not in WINDOWS:
            return "its window is neither 1x1 nor 3x3"
        if spec.stride not in STRIDES or spec.padding not in PADDINGS:
            return "its stride is neither 1 nor 2, or its padding neither 0 nor 1"
        if spec.dtype not in emit.VALUE_TYPES:
            return f"{spec.dtype} is not one of float32, bfloat16, float16"
        if not self._isa().present():
            return f"this CPU has no {self._isa().name}"
        return None if build.compiler() else "no C++ compiler (g++) on PATH"

    def lower(self, spec: ConvSpec) -> ConvLowering:
        """Generates, builds and caches the kernel. Raises KernelBuildFailed."""
        isa = self._isa()
        text = emit.conv_source(spec.dtype, isa)
        prefix = f"conv2d_{emit.VALUE_TYPES[spec.dtype]}_{isa.name}"
        handle, path = build.build(prefix, text, isa.flags)
        try:
            load(handle)
        except KernelNotFound:  # whole, but made where there were other system libraries
            path.unlink()
            handle, path = build.build(prefix, text, isa.flags)
        source = str(path.with_suffix(".cpp"))
        return ConvLowering(torch.ops.sparsefx_cpp.conv2d.default, handle, text, source)

    def _isa(self) -> Isa:
        return best(VECTOR_ISAS) if self.isa is None else named(self.isa, VECTOR_ISAS)


CONV_KERNELS = (CppConv(),)


def conv2d(
    x: Tensor,
    packed: Sequence[Tensor],
    bias: Tensor | None,
    shape: list[int],
    stride: int,
    padding: int,
    channels_last: bool,
    handle: str,
) -> Tensor:
    """conv2d(x, W) + bias by the library `handle`.

    x [batch, in, height, width]; packed: `convolutions.Taps` of W, which is of `shape` [out, in,
    rows, columns]; bias [out].
    Returns [batch, out, rows, columns], contiguous or channels last, x's dtype. No gradient. Raises
    ShapeMismatch, DtypeMismatch, KernelNotFound.
    """
    kernel = load(handle)
    _check(kernel, x, packed, bias)
    _check_sizes(x, packed, shape, stride, padding)
    y = conv_output(x, shape, stride, padding, channels_last)
    if not y.numel():
        return y
    is_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    x = x if is_last else x.contiguous()
    tensors = [each.contiguous() for each in packed]
    bias = None if bias is None else bias.contiguous()
    out, _, *window = shape
    sizes = (*x.shape, out, *window, stride, padding, is_last, channels_last)
    failed = kernel.run(
        x.data_ptr(),
        *[each.data_ptr() for each in tensors],
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        (ctypes.c_int64 * len(sizes))(*sizes),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("no memory for the planes that a sparse convolution works on")
    return y


def _check(kernel: Loaded, x: Tensor, packed: Sequence[Tensor], bias: Tensor | None) -> None:
    """The types that the C function takes on trust, and the sizes of what is stored."""
    values, columns, row_ptr = packed
    for name, tensor, dtype in (
        ("x", x, kernel.dtype),
        ("values", values, torch.float32),
        ("columns", columns, torch.int32),
        ("row_ptr", row_ptr, torch.int32),
        *([] if bias is None else [("bias", bias, kernel.dtype)]),
    ):
        if tensor.dtype is not dtype:
            raise DtypeMismatch(name=name, dtype=tensor.dtype, needed=dtype)
    if len(values) != len(columns):
        raise misshapen("values", values, f"there are {len(columns)} columns")
    if bias is not None and bias.shape != (len(row_ptr) - 1,):
        raise misshapen("bias", bias, f"the weight has {len(row_ptr) - 1} rows")


def _check_sizes(
    x: Tensor, packed: Sequence[Tensor], shape: Sequence[int], stride: int, padding: int
) -> None:
    """The sizes of a call that it takes on trust, but for what columns and row_ptr hold."""
    out, channels, *window = shape
    if tuple(window) not in WINDOWS or stride not in STRIDES or padding not in PADDINGS:
        rule = f"the kernel has no window {window} of stride {stride} and padding {padding}"
        raise misshapen("x", x, rule)
    if x.dim() != len(shape) or x.shape[1] != channels:
        raise misshapen("x", x, f"the weight reads {channels} channels of images")
    if min(x.shape[2:]) + 2 * padding < window[0]:
        raise misshapen("x", x, f"a window of {window} must fit into its planes")
    if len(packed[2]) != out + 1:
        raise misshapen("row_ptr", packed[2], f"the result has {out} channels")


_LIBRARY.impl("conv2d", conv2d, "CPU")
torch.library.register_fake(
    "sparsefx_cpp::conv2d",
    lambda x, packed, bias, shape, stride, padding, channels_last, handle: conv_output(
        x, shape, stride, padding, channels_last
    ),
    lib=_LIBRARY,
)
