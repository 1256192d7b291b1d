"""The CPU's attention kernels as data: which attentions they accept, how they lower them."""

from dataclasses import dataclass

import torch

from sparsefx.attention.operators import SCHEMAS
from sparsefx.attention.spec import TILES
from sparsefx.codegen.cpp import build
from sparsefx.codegen.cpp.attention import call, emit
from sparsefx.codegen.cpp.emit import VALUE_TYPES
from sparsefx.codegen.cpp.isa import Isa, best, named
from sparsefx.errors import KernelNotFound
from sparsefx.target import AttentionLowering, AttentionSpec

WIDEST = 256
"""The largest head dim: a tile's queries, scores and sums stay in the second-level cache."""


@dataclass(frozen=True)
class CppAttention:
    """A sparse attention of one `method` as a generated C function.

    `isa` forces an instruction set by name; None takes the best that this machine has.
    """

    method: str
    isa: str | None = None

    @property
    def name(self) -> str:
        """Shown in reports."""
        return f"cpp_{self.method}_attention"

    def accepts(self, spec: AttentionSpec) -> str | None:
        """None for yes, or the reason for no."""
        if spec.method != self.method:
            return f"{self.name} computes {self.method}, not {spec.method}"
        if spec.dtype not in VALUE_TYPES:
            return f"{spec.dtype} is not one of float32, bfloat16, float16"
        if not 1 <= spec.head_dim <= WIDEST:
            return f"a head dim of {spec.head_dim} is not within 1 to {WIDEST}"
        if any(size not in TILES for size in emit.tile_of(spec)):
            return f"tile {spec.tile} is not of {', '.join(map(str, TILES))}"
        if not self._isa().present():
            return f"this CPU has no {self._isa().name}"
        if build.compiler() is None:
            return "no C++ compiler (g++) on PATH"
        return None

    def lower(self, spec: AttentionSpec) -> AttentionLowering:
        """Generates, builds and caches the kernel. Raises KernelBuildFailed."""
        isa = self._isa()
        text, prefix = emit.source(spec, isa), f"{self.method}_{VALUE_TYPES[spec.dtype]}_{isa.name}"
        handle, path = build.build(prefix, text, isa.flags)
        try:
            call.load(handle)
        except KernelNotFound:  # whole, but made where there were other system libraries
            path.unlink()
            handle, path = build.build(prefix, text, isa.flags)
        op = getattr(torch.ops.sparsefx_cpp, f"{self.method}_attention").default
        return AttentionLowering(op, handle, text, path=str(path.with_suffix(".cpp")))

    def _isa(self) -> Isa:
        return best() if self.isa is None else named(self.isa)


ATTENTION_KERNELS = tuple(CppAttention(name.removesuffix("_attention")) for name in SCHEMAS)
