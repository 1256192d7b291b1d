"""The operator that launches generated Triton kernels: sparsefx_triton::linear.

On CUDA tensors it launches the kernel that the handle names. On CPU tensors it launches it where
Triton's interpreter is on (TRITON_INTERPRET=1), else it runs the plain meaning, so that a model
compiled for a GPU that is absent still gives the right numbers.
"""

import importlib.util
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefx import epilogue as epilogues
from sparsefx import ops
from sparsefx.codegen.triton import forms
from sparsefx.codegen.triton.form import Form
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
    variant, form = forms.parse(handle)
    if launches(x, form):
        from sparsefx.codegen.triton import launch  # imports Triton, which is slow

        return launch.linear(handle, x, packed, features, bias, extras)
    out = features * (2 if variant.is_gated else 1)
    weight = form.weight(variant, tuple(packed), out, x.shape[-1])
    return epilogues.apply(F.linear(x, weight, bias), variant.epilogue, extras).contiguous()


def launches(x: Tensor, form: Form | None = None) -> bool:
    """Whether an operator on `x` launches its kernel; if not, it runs the plain meaning."""
    if x.device.type != "cpu":
        return True
    if form is not None and not form.interpretable:
        return False
    # Triton's interpreter computes bf16 on its bits, silently wrong (3.6 to 3.9)
    return x.dtype != torch.bfloat16 and installed() and interpreting()


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, where it is installed."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("linear", linear, _device)
torch.library.register_fake(
    "sparsefx_triton::linear",
    lambda x, packed, bias, extras, handle, features: ops.linear_output(x, features),
    lib=_LIBRARY,
)
