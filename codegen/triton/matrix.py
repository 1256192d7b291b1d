"""Every kernel that can be generated, as jobs for the ahead-of-time compiler: the single list.

Handles are those of the kernels' own tunings for numbers of rows that take different tiles, so that
what is compiled is what a launch would compile. Sizes are those of a layer of a small language
model. Left out is what compiles to the same but for a constant or a type: of splits above one all
but the first, and of float16 all but the best guess.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sparsefx.codegen.triton.forms import FORMS
from sparsefx.codegen.triton.hardware import SPARSE_TENSOR_CORES
from sparsefx.codegen.triton.samples import DENSITY
from sparsefx.codegen.triton.variant import Settings, Variant
from sparsefx.epilogue import is_gated
from sparsefx.target import LinearSpec

NVIDIA = ("sm_80", "sm_89", "sm_90", "sm_100")
AMD = ("gfx942",)
OUT, IN = 1536, 1024
GATED = "gate_silu;add 0"
_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
_CODES = (("int8", 0), ("int4", 128), ("fp8", 0))


@dataclass(frozen=True)
class Job:
    """One kernel for one architecture, compiled as a launch with `rows` rows would.

    `place` is that of the handle among its kernel's tunings: 0 is the best guess, which runs where
    nothing can be measured.
    """

    handle: str
    arch: str
    rows: int
    place: int = 0
    kernel: str = "kernel"
    out_features: int = OUT
    in_features: int = IN

    def request(self) -> dict[str, object]:
        """What `aot_worker` is asked."""
        fields = dataclasses.asdict(self)
        del fields["place"]
        return fields

    def rank(self, seed: str) -> str:
        """Sorts jobs in an order that depends on `seed` alone, for samples of them."""
        return hashlib.sha256(f"{seed} {self}".encode()).hexdigest()


def jobs() -> Iterator[Job]:
    """All of them, in a fixed order."""
    beside: set[tuple[str, torch.dtype, bool, bool]] = set()
    for form, spec in _specs():
        archs = NVIDIA if FORMS[form].needs == SPARSE_TENSOR_CORES else NVIDIA + AMD
        for place, settings in enumerate(_tunings(form, spec)):
            handle = Variant.of(form, spec, settings).handle
            kernels = ["kernel"]
            for name in _beside(form, settings, spec.rows):
                key = (name, spec.dtype, spec.rows < 4, is_gated(spec.epilogue))
                kernels += [name] * (key not in beside)
                beside.add(key)
            for kernel, arch in itertools.product(kernels, archs):
                yield Job(handle, arch, spec.rows, place, kernel)


def _tunings(form: str, spec: LinearSpec) -> list[Settings]:
    """Those that compile to something of their own."""
    found = FORMS[form].tunings(spec)[: 1 if spec.dtype == _FP16 else None]
    several = {tuple((k, min(v, 2) if k == "split" else v) for k, v in s): s for s in found[::-1]}
    return [settings for settings in found if settings in several.values()]


def _beside(form: str, settings: Settings, rows: int) -> Iterator[str]:
    """The other kernels that a call of these settings launches."""
    chosen = dict(settings)
    if chosen.get("split", 1) > 1:
        yield "reduce"
    if chosen.get("direct") == 0:
        yield "fragments_of"
    if form == "places" and rows > 1:
        yield "ordered"


def _specs() -> Iterator[tuple[str, LinearSpec]]:
    yield from _mma_sp()
    yield from _parity()
    yield from _nm()
    yield from _places()
    yield from _bitmap()
    yield from _block()
    yield from _gated()


def _mma_sp() -> Iterator[tuple[str, LinearSpec]]:
    kinds = (((2, 4), ""), ((1, 4), ""), ((2, 4), "int8"), ((2, 4), "int4"))
    for (pattern, values), dtype, rows in itertools.product(kinds, (_BF16, _FP16), (1, 16, 32, 64)):
        group = 128 if values == "int4" else 0
        yield "mma_sp", _spec("nm", dtype, rows, pattern, values=values, group=group)


def _parity() -> Iterator[tuple[str, LinearSpec]]:
    for dtype, rows in itertools.product((_BF16, _FP16), (1, 32, 64)):
        yield "parity", _spec("nm", dtype, rows, (2, 4))


def _nm() -> Iterator[tuple[str, LinearSpec]]:
    patterns = ((1, 4), (2, 4), (2, 8), (4, 8), (3, 16), (8, 16))
    for pattern, dtype, rows in itertools.product(patterns, (_BF16, _FP16), (1, 20, 100)):
        yield "nm", _spec("nm", dtype, rows, pattern)
    for rows in (1, 100):
        yield "nm", _spec("nm", _FP32, rows, (2, 4))
        for values, group in _CODES:
            yield "nm", _spec("nm", _BF16, rows, (2, 4), values=values, group=group)


def _places() -> Iterator[tuple[str, LinearSpec]]:
    for dtype, rows in itertools.product((_BF16, _FP16), (1, 16)):
        yield "places", _spec("bitmap", dtype, rows)


def _bitmap() -> Iterator[tuple[str, LinearSpec]]:
    for dtype, rows in itertools.product((_BF16, _FP16, _FP32), (1, 20, 100)):
        yield "bitmap", _spec("bitmap", dtype, rows)
    for (values, group), rows in itertools.product(_CODES, (1, 100)):
        yield "bitmap", _spec("bitmap", _BF16, rows, values=values, group=group)


def _block() -> Iterator[tuple[str, LinearSpec]]:
    blocks = ((16, 16), (32, 32), (64, 64), (128, 128), (128, 32))
    for block, dtype, rows in itertools.product(blocks, (_BF16, _FP16), (1, 512)):
        yield "block", _spec("block", dtype, rows, block=block)
    for rows in (1, 512):
        yield "block", _spec("block", _FP32, rows, block=(64, 64))
        for values, _ in _CODES:
            yield "block", _spec("block", _BF16, rows, block=(64, 64), values=values)


def _gated() -> Iterator[tuple[str, LinearSpec]]:
    yield "places", _spec("bitmap", _BF16, 16, epilogue=GATED)
    for rows in (1, 32):
        yield "mma_sp", _spec("nm", _BF16, rows, (2, 4), epilogue=GATED)
        yield "parity", _spec("nm", _BF16, rows, (2, 4), epilogue=GATED)
        yield "nm", _spec("nm", _BF16, rows, (2, 4), epilogue=GATED)
        yield "bitmap", _spec("bitmap", _BF16, rows, epilogue=GATED)
        yield "block", _spec("block", _BF16, rows, block=(64, 64), epilogue=GATED)


def _spec(
    layout: str,
    dtype: torch.dtype,
    rows: int,
    pattern: tuple[int, int] = (0, 0),
    block: tuple[int, int] = (0, 0),
    values: str = "",
    group: int = 0,
    epilogue: str = "",
) -> LinearSpec:
    n, m = pattern
    density = n / m if m else DENSITY
    epilogue = epilogue or ("silu;mul 0" if rows > 1 else "")
    size = (OUT, IN, n, m, density, dtype, True, epilogue, rows, False)
    return LinearSpec(layout, *size, block=block, values=values, group=group)
