"""The instruction sets that C++ kernels are generated for, best first, and which this CPU has."""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from sparsefx.errors import UnknownOption
from sparsefx.target import LinearSpec

_BITS = ("-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt")


# The share of kept values up to which a block of 64 or 32 columns mostly keeps at most 16.
_FEW_OF_64, _FEW_OF_32 = 0.17, 0.35


@dataclass(frozen=True)
class Isa:
    """An instruction set: the templates of its block, g++ flags, and what /proc/cpuinfo must list.

    `header` takes one keep bit a column; `pick_header` N:M indices with at most half kept;
    `few_headers` keep bits of bitmaps that keep few of 64 and of 32 columns; `bf16_header` keep
    bits, multiplies bfloat16. "" or () where the instruction set is no faster that way.
    """

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]
    header: str
    pick_header: str = ""
    few_headers: tuple[str, str] | None = None
    bf16_header: str = ""

    def template(self, spec: LinearSpec) -> str:
        """The file in templates/ that computes the block of a kernel for `spec`."""
        if self.bf16_header and spec.dtype is torch.bfloat16:
            return self.bf16_header
        if self.pick_header and 0 < 2 * spec.n <= spec.m:
            return self.pick_header
        if self.few_headers and spec.layout == "bitmap" and spec.density <= _FEW_OF_32:
            return self.few_headers[spec.density > _FEW_OF_64]
        return self.header

    def picks(self, spec: LinearSpec) -> bool:
        """Whether the kernel for `spec` reads N:M indices (else keep bits)."""
        return bool(self.pick_header) and self.template(spec) == self.pick_header

    def present(self) -> bool:
        """Whether this machine can run it."""
        return self.needs <= _cpu_flags()


_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq")
_NEWER = ("avx512vbmi", "avx512_vbmi2", "avx512_vnni", "avx512_bf16")
AVX512 = Isa(
    name="avx512",
    flags=(*(f"-m{flag}" for flag in _AVX512), *_BITS),
    needs=frozenset({*_AVX512, "fma", "f16c", "bmi2"}),
    header="avx512.h",
    pick_header="avx512_pick.h",
)
AVX512_VNNI = Isa(
    name="avx512_vnni",
    flags=(*AVX512.flags, *(f"-m{flag.replace('_', '')}" for flag in _NEWER)),
    needs=AVX512.needs | {*_NEWER},
    header="avx512.h",
    pick_header="avx512_pick.h",
    few_headers=("avx512_places_64.h", "avx512_places_32.h"),
    bf16_header="avx512_bf16.h",
)
AVX2 = Isa(
    name="avx2",
    flags=("-mavx2", *_BITS),
    needs=frozenset({"avx2", "fma", "f16c", "bmi2"}),
    header="avx2.h",
)
PORTABLE = Isa(name="portable", flags=(), needs=frozenset(), header="portable.h")
ISAS = (AVX512, AVX2, PORTABLE)
LINEAR_ISAS = (AVX512_VNNI, *ISAS)


def best(isas: tuple[Isa, ...] = ISAS) -> Isa:
    """The first of `isas` that this machine can run."""
    return next(isa for isa in isas if isa.present())


def named(name: str, isas: tuple[Isa, ...] = ISAS) -> Isa:
    """The one of `isas` that is called `name`. Raises UnknownOption."""
    for isa in isas:
        if isa.name == name:
            return isa
    raise UnknownOption(option="isa", value=name, known=", ".join(isa.name for isa in isas))


@functools.cache
def _cpu_flags() -> frozenset[str]:
    """Empty where there is no /proc/cpuinfo: only the portable kernel is safe there."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = (line for line in text.splitlines() if line.startswith("flags"))
    return frozenset(next(lines, "").partition(":")[2].split())
