"""Loads a generated kernel and launches it; imports Triton, so it is imported at first use."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from sparsefx.codegen.triton import emit, forms, loader
from sparsefx.codegen.triton.form import Call, Form, Problem
from sparsefx.codegen.triton.variant import Variant
from sparsefx.errors import DtypeMismatch
from sparsefx.ops import linear_output


@dataclass(frozen=True)
class Loaded:
    """A generated module, and what it was generated for."""

    variant: Variant
    form: Form
    module: ModuleType

    def calls(self, problem: Problem) -> tuple[Call, ...]:
        """The launches that compute `problem.y`, in order."""
        return self.form.calls(self.variant, problem)


@functools.cache
def load(handle: str) -> Loaded:
    """The kernel that `handle` names, generated if the cache folder lacks it; loaded once.

    Raises InvalidHandle.
    """
    variant, form = forms.parse(handle)
    path, _ = emit.write(variant, form)
    return Loaded(variant, form, loader.import_file(str(path)))


def linear(
    handle: str,
    x: Tensor,
    packed: Sequence[Tensor],
    features: int,
    bias: Tensor | None,
    extras: Sequence[Tensor],
) -> Tensor:
    """Runs the kernel: epilogue(x W^T + bias), [..., features], contiguous, in x's dtype.

    Raises InvalidHandle, DtypeMismatch, or KernelBuildFailed where Triton refuses the kernel on
    this device.
    """
    loaded = load(handle)
    variant = loaded.variant
    if x.dtype != variant.dtype:
        raise DtypeMismatch(name="x", dtype=x.dtype, needed=variant.dtype)
    y = linear_output(x, features)
    if not y.numel():
        return y
    problem = Problem(
        x=x.reshape(-1, x.shape[-1]).contiguous(),
        packed=tuple(packed),
        bias=bias,
        extras=tuple(extra.contiguous() for extra in extras),
        y=y.view(-1, features),
        out_features=features * 2 if variant.is_gated else features,
    )
    for call in loaded.calls(problem):
        loader.run(handle, loaded.module, call, x)
    return y
