"""The kernels of the CUDA target: which packed linears they accept and how they are called."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefx.codegen.triton import emit, library
from sparsefx.codegen.triton.variant import DTYPES, Variant
from sparsefx.epilogue import is_gated
from sparsefx.formats import NM_GROUPS
from sparsefx.target import Kernel, LinearSpec, Lowering


@dataclass(frozen=True)
class TritonLinear:
    """A generated Triton kernel for weights of one layout, "nm" or "bitmap"."""

    layout: str

    @property
    def name(self) -> str:
        """Shown in reports; stable."""
        return f"triton_{self.layout}_linear"

    def accepts(self, spec: LinearSpec) -> str | None:
        """None for yes, or the reason for no."""
        if spec.layout != self.layout:
            return f"the weight is stored as {spec.layout}, this kernel reads {self.layout}"
        if not library.installed():
            return "Triton is not installed"
        if spec.values:
            return f"it reads values of the input's type, not {spec.values}"
        if spec.dtype not in DTYPES.values():
            return f"the kernel computes {', '.join(DTYPES)}, not {spec.dtype}"
        if not spec.out_features or not spec.in_features:
            return "the weight is empty"
        if is_gated(spec.epilogue):
            return "it does not multiply gate and up"
        return self._misfit(spec) or _unprintable(spec)

    def tunings(self, spec: LinearSpec) -> "tuple[TritonLinear, ...]":
        """One: its code has no settings."""
        return (self,)

    def lower(self, spec: LinearSpec, packed: tuple[Tensor, ...]) -> Lowering:
        """Prints the kernel into the cache folder; Triton compiles it at the first launch.

        `packed` is used as it is stored (`sparsefx.formats`).
        """
        variant = Variant.of(spec)
        path, text = emit.write(variant)
        op, features = torch.ops.sparsefx_triton.linear.default, spec.out_features
        stored = tuple(tensor.contiguous() for tensor in packed)
        return Lowering(op, stored, variant.handle, features, text, str(path))

    def _misfit(self, spec: LinearSpec) -> str | None:
        if self.layout == "bitmap":
            stored = spec.density * spec.out_features * spec.in_features
            return "more than 2^31 - 1 stored values" if stored >= 2**31 else None
        if spec.m not in NM_GROUPS or not 0 < spec.n < spec.m:
            return f"{spec.n}:{spec.m} is not n:m with 0 < n < m and m in {NM_GROUPS}"
        if spec.in_features % spec.m:
            return f"{spec.in_features} input features are not a multiple of m={spec.m}"
        return None


def kernels() -> tuple[Kernel, ...]:
    """The Triton kernels, in order of preference."""
    return (TritonLinear("nm"), TritonLinear("bitmap"))


def _unprintable(spec: LinearSpec) -> str | None:
    try:
        Variant.of(spec)
    except ValueError as error:
        return str(error)
    return None
