"""The operator that launches generated Triton kernels: sparsefx_triton::linear.

On CUDA tensors it launches the kernel that the handle names. On CPU tensors it launches it where
Triton's interpreter is on (TRITON_INTERPRET=1), else it runs the plain meaning, so that a model
compiled for a GPU that is absent still gives the right numbers.
"""

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsefx import ops
from sparsefx.codegen.triton.variant import Variant
from sparsefx.target import LINEAR_SCHEMA

_LIBRARY = torch.library.Library("sparsefx_triton", "DEF")
_LIBRARY.define(LINEAR_SCHEMA)


def installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def linear(
    x: Tensor,
    packed: Sequence[Tensor],
    bias: Tensor | None,
    extras: Sequence[Tensor],
    handle: str,
    features: int,
) -> Tensor:
    """The packed linear of `sparsefx.ops` that `handle` names; its epilogue is in there too."""
    if launches(x):
        from sparsefx.codegen.triton import launch  # imports Triton, which is slow

        return launch.linear(handle, x, packed, features, bias, extras)
    return _meaning(Variant.parse(handle), x, packed, bias, list(extras))


def _meaning(
    variant: Variant,
    x: Tensor,
    packed: Sequence[Tensor],
    bias: Tensor | None,
    extras: list[Tensor],
) -> Tensor:
    values, keys, *rest = packed
    if variant.layout == "nm":
        pattern = (variant.n, variant.m)
        return ops.nm_linear(x, values, keys, bias, *pattern, variant.epilogue, extras)
    return ops.bitmap_linear(x, values, keys, rest[0], bias, variant.epilogue, extras)


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
    _LIBRARY.impl("linear", linear, _device)
torch.library.register_fake(
    "sparsefx_triton::linear",
    lambda x, packed, bias, extras, handle, features: ops.linear_output(x, features),
    lib=_LIBRARY,
)
