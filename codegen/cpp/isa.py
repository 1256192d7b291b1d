"""The instruction sets that C++ kernels are generated for, best first, and which this CPU has."""

import ctypes
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from sparsefx.errors import UnknownOption
from sparsefx.target import LinearSpec

_BITS = ("-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt")

BY_LISTS, BY_TILES = "by_lists.h", "by_tiles.h"
"""Templates of how to multiply by more rows of x than a block is for."""


class Block(NamedTuple):
    """A template that computes blocks of `width` columns, and the one for more rows of x."""

    header: str
    width: int
    many: str = BY_LISTS


# The share of kept values up to which a block of 64 or 32 columns mostly keeps at most 16.
_FEW_OF_64, _FEW_OF_32 = 0.17, 0.35
# The share of kept values from which on tiles win: they are no faster where less is kept.
_FEWEST_FOR_TILES = 0.04


@dataclass(frozen=True)
class Isa:
    """An instruction set: its templates, g++ flags, and what /proc/cpuinfo must list.

    `plain` takes one keep bit a column; `pick` N:M indices with at most half kept; `few` keep bits
    of bitmaps that keep few of 64 and of 32 columns; `bf16` and `int8` keep bits, and multiplies
    bfloat16, or int8 by int8. None where the instruction set is no faster that way. `base` is the
    one that it adds tiles to.
    """

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str]
    plain: Block
    pick: Block | None = None
    few: tuple[Block | None, Block | None] = (None, None)
    bf16: Block | None = None
    int8: Block | None = None
    base: "Isa | None" = None

    def serving(self, spec: LinearSpec) -> "Isa":
        """Itself, or `base` where what it adds to it is of no use with `spec`."""
        if self.base is None or self._adds(spec):
            return self
        return self.base

    def _adds(self, spec: LinearSpec) -> bool:
        """Whether tiles multiply `spec`: not with scales by groups of columns, nor so few values
        that to list them takes less time."""
        by_tiles = spec.layout != "block" and self.block(spec).many == BY_TILES
        return by_tiles and not spec.group and spec.density > _FEWEST_FOR_TILES

    def block(self, spec: LinearSpec) -> Block:
        """The template for `spec`: the first wanted whose blocks fill groups, or else `plain`."""
        fitting = (b for b in self._wanted(spec) if b and not spec.group % b.width)
        return next(fitting, self.plain)

    def _wanted(self, spec: LinearSpec) -> Iterator[Block | None]:
        is_dynamic = spec.values == "int8_dynamic"
        if is_dynamic:
            yield self.int8
        if spec.dtype is torch.bfloat16 and not is_dynamic:
            yield self.bf16
        if 0 < 2 * spec.n <= spec.m:
            yield self.pick
        if spec.layout == "bitmap" and spec.density <= _FEW_OF_32:
            yield from self.few[spec.density > _FEW_OF_64 :]

    def picks(self, spec: LinearSpec) -> bool:
        """Whether the kernel for `spec` reads N:M indices (else keep bits)."""
        return self.pick is not None and self.block(spec) == self.pick

    @property
    def scalar_header(self) -> str:
        """The file in templates/ that converts single numbers."""
        return "x86.h" if self.flags else "scalar.h"

    def present(self) -> bool:
        """Whether this machine can run it, and lets this process."""
        return self.needs <= _cpu_flags() and (self.base is None or _may_use_tiles())


_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq")
_NEWER = ("avx512vbmi", "avx512_vbmi2", "avx512_vnni", "avx512_bf16")
AVX512 = Isa(
    name="avx512",
    flags=(*(f"-m{flag}" for flag in _AVX512), *_BITS),
    needs=frozenset({*_AVX512, "fma", "f16c", "bmi2"}),
    plain=Block("avx512.h", 16),
    pick=Block("avx512_pick.h", 32),
)
AVX512_VNNI = Isa(
    name="avx512_vnni",
    flags=(*AVX512.flags, *(f"-m{flag.replace('_', '')}" for flag in _NEWER)),
    needs=AVX512.needs | {*_NEWER},
    plain=AVX512.plain,
    pick=AVX512.pick,
    few=(Block("avx512_places_64.h", 64), Block("avx512_places_32.h", 32)),
    bf16=Block("avx512_bf16.h", 32),
    int8=Block("avx512_int8.h", 64),
)
# Processors that have it, Intel's, expand a register in 2 cycles. With a fifth kept that takes 0.75
# to 0.9 of the time of lists of places at 1 to 4 rows of x (Emerald Rapids, 4096 x 4096).
AVX512_FP16 = replace(
    AVX512_VNNI,
    name="avx512_fp16",
    needs=AVX512_VNNI.needs | {"avx512_fp16"},
    plain=Block("avx512_expand.h", 16),
    few=(Block("avx512_places_64.h", 64), None),
)
_TILES = ("amx_tile", "amx_bf16", "amx_int8")
AMX = replace(
    AVX512_FP16,
    name="amx",
    flags=(*AVX512_FP16.flags, *(f"-m{flag.replace('_', '-')}" for flag in _TILES)),
    needs=AVX512_FP16.needs | {*_TILES},
    bf16=Block("amx_bf16.h", 32, BY_TILES),
    int8=Block("amx_int8.h", 64, BY_TILES),
    base=AVX512_FP16,
)
AVX2 = Isa(
    name="avx2",
    flags=("-mavx2", *_BITS),
    needs=frozenset({"avx2", "fma", "f16c", "bmi2"}),
    plain=Block("avx2.h", 16),
)
PORTABLE = Isa(name="portable", flags=(), needs=frozenset(), plain=Block("portable.h", 16))
ISAS = (AVX512, AVX2, PORTABLE)
VECTOR_ISAS = (AVX512_FP16, AVX512_VNNI, *ISAS)
"""Of kernels whose numbers are float32: tiles do not multiply these."""
LINEAR_ISAS = (AMX, *VECTOR_ISAS)


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


@functools.cache
def _may_use_tiles() -> bool:
    """Whether the system lets this process use AMX once it has asked; it may refuse."""
    arch_prctl, request, tiles = 158, 0x1023, 18  # ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request, tiles) == 0)
