"""Makes Triton's CPU interpreter compute bfloat16: a repair for tests only.

The interpreter (Triton 3.6 to 3.9) keeps a bfloat16 as its 16 bits in a numpy uint16, so that dot,
cast and arithmetic work on the bits as integers, and a cast from float32 cuts instead of rounding
to nearest even. `repaired` replaces the casts and the dot, which are what our kernels use: they
accumulate in float32 and cast every other operand to it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import numpy.typing as npt
import triton.language as tl
from triton.runtime import interpreter

Bits = npt.NDArray[np.uint16]
Floats = npt.NDArray[np.float32]
_BUILDER = interpreter.InterpreterBuilder
_cast, _dot = _BUILDER.cast_impl, _BUILDER.create_dot


def widen(bits: Bits) -> Floats:
    """bfloat16 bits as float32, exactly."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values: Floats) -> Bits:
    """float32 as bfloat16 bits, rounded to nearest even; NaN stays NaN."""
    word = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    odd = (word >> np.uint32(16)) & np.uint32(1)
    rounded = (word + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


@contextmanager
def repaired() -> Iterator[None]:
    """Within it, interpreted kernels compute bfloat16 rightly."""
    with (
        mock.patch.object(_BUILDER, "cast_impl", _cast_impl),
        mock.patch.object(_BUILDER, "create_dot", _create_dot),
        mock.patch.object(_BUILDER, "create_fp_to_fp", _fp_to_fp),
    ):
        yield


def _wide(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle(widen(handle.data), tl.float32)


def _cast_impl(
    self: interpreter.InterpreterBuilder, source: interpreter.TensorHandle, dtype: tl.dtype
) -> interpreter.TensorHandle:
    wanted = dtype.scalar
    if wanted == source.dtype.scalar:
        return source
    if wanted == tl.bfloat16:
        return interpreter.TensorHandle(narrow(_wide(source).data.astype(np.float32)), wanted)
    return _cast(self, _wide(source), dtype)


def _fp_to_fp(
    self: interpreter.InterpreterBuilder,
    source: interpreter.TensorHandle,
    dtype: tl.dtype,
    rounding: object,
) -> interpreter.TensorHandle:
    return _cast_impl(self, source, dtype)


def _create_dot(
    self: interpreter.InterpreterBuilder,
    a: interpreter.TensorHandle,
    b: interpreter.TensorHandle,
    acc: interpreter.TensorHandle,
    *options: object,
) -> interpreter.TensorHandle:
    assert acc.dtype.scalar == tl.float32, "the kernels accumulate in float32"
    return _dot(self, _wide(a), _wide(b), acc, *options)
