"""The instruction sets that C++ kernels are generated for, best first, and which this CPU has."""

import functools
from dataclasses import dataclass
from pathlib import Path

from sparsefx.errors import UnknownOption

_BITS = ("-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt")


@dataclass(frozen=True)
class Isa:
    """An instruction set: the templates of its block, g++ flags, and what /proc/cpuinfo must list.

    `header` takes one keep bit a column; `pick_header` takes N:M indices with at most half kept,
    "" where the instruction set is no faster that way.
    """

    name: str
    header: str
    pick_header: str
    flags: tuple[str, ...]
    needs: frozenset[str]

    def picks(self, n: int, m: int) -> bool:
        """Whether a kernel for n:m reads indices (else keep bits); n = m = 0 is a bitmap."""
        return bool(self.pick_header) and 0 < 2 * n <= m

    def present(self) -> bool:
        """Whether this machine can run it."""
        return self.needs <= _cpu_flags()


AVX512 = Isa(
    name="avx512",
    header="avx512.h",
    pick_header="avx512_pick.h",
    flags=("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *_BITS),
    needs=frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma", "f16c", "bmi2"}),
)
AVX2 = Isa(
    name="avx2",
    header="avx2.h",
    pick_header="",
    flags=("-mavx2", *_BITS),
    needs=frozenset({"avx2", "fma", "f16c", "bmi2"}),
)
PORTABLE = Isa(name="portable", header="portable.h", pick_header="", flags=(), needs=frozenset())
ISAS = (AVX512, AVX2, PORTABLE)


def best() -> Isa:
    """The first of ISAS that this machine can run."""
    return next(isa for isa in ISAS if isa.present())


def named(name: str) -> Isa:
    """The instruction set called `name`. Raises UnknownOption."""
    for isa in ISAS:
        if isa.name == name:
            return isa
    raise UnknownOption(option="isa", value=name, known=", ".join(isa.name for isa in ISAS))


@functools.cache
def _cpu_flags() -> frozenset[str]:
    """Empty where there is no /proc/cpuinfo: only the portable kernel is safe there."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = (line for line in text.splitlines() if line.startswith("flags"))
    return frozenset(next(lines, "").partition(":")[2].split())
