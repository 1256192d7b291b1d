"""The CPU's kernels as data: which packed linears they accept and how they lower them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefx.codegen.cpp import block_call, build, call, emit
from sparsefx.codegen.cpp.isa import LINEAR_ISAS, Isa, best, named
from sparsefx.codegen.cpp.operator import OPERATOR
from sparsefx.epilogue import features, is_gated
from sparsefx.errors import KernelNotFound
from sparsefx.formats import NM_GROUPS, PackedNM, pack_bits, unpack_nm
from sparsefx.target import LinearSpec, Lowering

_LONGEST_SUM = (2**31 - 1) // (255 * 127)  # of unsigned by signed bytes


@dataclass(frozen=True)
class CppLinear:
    """A packed linear of one `layout` ("nm", "bitmap" or "block") as a generated C function.

    `isa` forces an instruction set by name; None takes the best that this machine has.
    """

    layout: str
    isa: str | None = None

    @property
    def name(self) -> str:
        """Shown in reports."""
        return f"cpp_{self.layout}_linear"

    def accepts(self, spec: LinearSpec) -> str | None:
        """None for yes, or the reason for no."""
        if spec.layout != self.layout:
            return f"{self.name} reads the {self.layout} layout, not {spec.layout}"
        if spec.values and spec.values not in emit.STORED:
            return f"it widens codes of int8 and int4, not of {spec.values}"
        if spec.dtype not in emit.VALUE_TYPES:
            return f"{spec.dtype} is not one of float32, bfloat16, float16"
        if self.layout == "nm" and (spec.m not in NM_GROUPS or spec.in_features % spec.m):
            return f"{spec.n}:{spec.m} does not divide {spec.in_features} input features"
        if self.layout == "block" and (refusal := _refused_block(spec)):
            return refusal
        if spec.group % self._isa(spec).plain.width:
            return f"groups of {spec.group} columns are no blocks of {self._isa(spec).plain.width}"
        if spec.values == "int8_dynamic" and (spec.group or spec.in_features) > _LONGEST_SUM:
            return f"int8 sums of {spec.in_features} products do not fit 32 bits"
        return self._absent(spec)

    def tunings(self, spec: LinearSpec) -> "tuple[CppLinear, ...]":
        """One: its code has no settings."""
        return (self,)

    def lower(self, spec: LinearSpec, packed: tuple[Tensor, ...]) -> Lowering:
        """Generates, builds and caches the kernel. Raises KernelBuildFailed.

        Kernels that cannot use N:M indices get one keep bit a column instead, which is no more
        bytes at 2:4, 4:8 and 2:8. Values, and all tensors of a bitmap, are passed on uncopied.
        """
        isa = self._isa(spec)
        text = emit.source(spec, isa)
        handle, path = build.build(_prefix(spec, isa), text, isa.flags)
        load = block_call.load if self.layout == "block" else call.load
        try:
            load(handle)
        except KernelNotFound:  # whole, but made where there were other system libraries
            path.unlink()
            handle, path = build.build(_prefix(spec, isa), text, isa.flags)
        OPERATOR.ready()
        as_is = self.layout != "nm" or isa.picks(spec)
        arranged = packed if as_is else _keep_bits(spec, packed)
        op, source = torch.ops.sparsefx_cpp.linear.default, path.with_suffix(".cpp")
        width = features(spec.out_features, spec.epilogue)
        return Lowering(op, arranged, handle, width, text, str(source))

    def _absent(self, spec: LinearSpec) -> str | None:
        """What this machine lacks to run it."""
        isa = self._isa(spec)
        if not isa.present():
            return f"this CPU has no {isa.name}"
        return None if build.compiler() else "no C++ compiler (g++) on PATH"

    def _isa(self, spec: LinearSpec) -> Isa:
        isa = best(LINEAR_ISAS) if self.isa is None else named(self.isa, LINEAR_ISAS)
        return isa.serving(spec)


TARGET_KERNELS = (CppLinear("nm"), CppLinear("bitmap"), CppLinear("block"))


def _refused_block(spec: LinearSpec) -> str | None:
    if spec.values:
        return f"it reads blocks of the input's type, not of {spec.values}"
    if spec.block[0] % 2 and is_gated(spec.epilogue):
        return f"blocks of {spec.block[0]} rows part gates from what they gate"
    return None


def _keep_bits(spec: LinearSpec, packed: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    values, index, *scales = packed
    shape = (spec.out_features, spec.in_features // spec.m * spec.n)
    ones = torch.ones(shape, dtype=torch.uint8, device=values.device)
    keep = unpack_nm(PackedNM(ones, index), spec.n, spec.m)
    return values, pack_bits(keep), *scales


def _prefix(spec: LinearSpec, isa: Isa) -> str:
    sizes = {"nm": (spec.n, spec.m), "block": spec.block}.get(spec.layout, ())
    pattern = "".join(f"{size}_" for size in sizes)
    values = f"{spec.values}_" if spec.values else ""
    return f"{spec.layout}_{pattern}{values}{emit.VALUE_TYPES[spec.dtype]}_{isa.name}"
