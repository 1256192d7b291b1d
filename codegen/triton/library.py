"""The operators that launch generated Triton kernels: sparsefx_triton::nm_linear, ::bitmap_linear.

On CUDA tensors they launch the kernel that the handle names. On CPU tensors they launch it where
Triton's interpreter is on (TRITON_INTERPRET=1), else they run the plain meaning, so that a model
compiled for a GPU that is absent still gives the right numbers.
"""

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsefx import ops
from sparsefx.codegen.triton.variant import Variant

_LIBRARY = torch.library.Library("sparsefx_triton", "DEF")
_LIBRARY.define(
    "nm_linear(Tensor x, Tensor values, Tensor index, Tensor? bias, Tensor[] extras, "
    "str handle) -> Tensor"
)
_LIBRARY.define(
    "bitmap_linear(Tensor x, Tensor values, Tensor bits, Tensor row_ptr, Tensor? bias, "
    "Tensor[] extras, str handle) -> Tensor"
)


def installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def nm_linear(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    extras: Sequence[Tensor],
    handle: str,
) -> Tensor:
    """`sparsefx.ops.nm_linear` by the kernel that `handle` names; n, m and epilogue are in it."""
    if launches(x):
        return _launch(handle, x, (values, index), values.shape[0], bias, extras)
    variant = Variant.parse(handle)
    return ops.nm_linear(
        x, values, index, bias, variant.n, variant.m, variant.epilogue, list(extras)
    )


def bitmap_linear(
    x: Tensor,
    values: Tensor,
    bits: Tensor,
    row_ptr: Tensor,
    bias: Tensor | None,
    extras: Sequence[Tensor],
    handle: str,
) -> Tensor:
    """`sparsefx.ops.bitmap_linear` by the kernel that `handle` names."""
    if launches(x):
        return _launch(handle, x, (values, bits, row_ptr), bits.shape[0], bias, extras)
    epilogue = Variant.parse(handle).epilogue
    return ops.bitmap_linear(x, values, bits, row_ptr, bias, epilogue, list(extras))


def _launch(
    handle: str,
    x: Tensor,
    packed: Sequence[Tensor],
    out_features: int,
    bias: Tensor | None,
    extras: Sequence[Tensor],
) -> Tensor:
    from sparsefx.codegen.triton import launch  # imports Triton, which is slow

    return launch.linear(handle, x, packed, out_features, bias, extras)


def launches(x: Tensor) -> bool:
    """Whether an operator on `x` launches its kernel; if not, it runs the plain meaning."""
    if x.device.type != "cpu":
        return True
    # Triton's interpreter computes bf16 on its bits, silently wrong (3.6 to 3.9)
    return x.dtype != torch.bfloat16 and installed() and _interpreting()


def _interpreting() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("nm_linear", nm_linear, _device)
    _LIBRARY.impl("bitmap_linear", bitmap_linear, _device)
torch.library.register_fake(
    "sparsefx_triton::nm_linear",
    lambda x, values, *_: ops.linear_output(x, values.shape[0]),
    lib=_LIBRARY,
)
torch.library.register_fake(
    "sparsefx_triton::bitmap_linear",
    lambda x, values, bits, *_: ops.linear_output(x, bits.shape[0]),
    lib=_LIBRARY,
)
