"""Compiles a generated kernel for a GPU that is not there, and reads what it costs.

The arguments are the ones that a real call passes to Triton, so the launch itself is checked too: a
stand-in driver names the device, Triton's own JIT specialises and compiles for it. Needs nothing
but the Triton wheel, which brings ptxas. TRITON_INTERPRET must be unset, and a compiler crash ends
the process: `python -m sparsefx.codegen.triton.aot_worker` is one of its own.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.errors import TritonError
from triton.runtime import driver

from sparsefx.codegen.triton import launch, ptx
from sparsefx.codegen.triton.attention import launch as attention
from sparsefx.codegen.triton.attention.samples import SAMPLES
from sparsefx.codegen.triton.loader import Call, jitted
from sparsefx.codegen.triton.variant import Variant
from sparsefx.epilogue import BINARY
from sparsefx.errors import KernelBuildFailed, UnknownOption
from sparsefx.formats import index_bits

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
INSTRUCTIONS = {
    "mma": r"mma\.sync",
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mfma": r"v_mfma_",
    "cp_async": r"cp\.async\.c[ag]",
    "load": r"ld\.global|global_load|buffer_load",
    "store": r"st\.global|global_store|buffer_store",
    "exp2": r"ex2\.approx|v_exp_f32",
    "local": r"(?:ld|st)\.local|scratch_",
}
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs.

    registers: a thread; spills: bytes stored and loaded (NVIDIA) or registers (AMD); stack: bytes a
    thread; shared: bytes a program; instructions: how many of each of INSTRUCTIONS its PTX or
    AMD assembly holds; looped: how many of these lie in a loop; avoidable: and some iteration
    branches around them (`ptx.loops`; both only for PTX).
    """

    arch: str
    registers: int
    spills: int
    stack: int
    shared: int
    instructions: dict[str, int]
    looped: dict[str, int]
    avoidable: dict[str, int]


class _Compiled(Protocol):
    """The part of Triton's CompiledKernel that is read here."""

    asm: dict[str, str]
    metadata: "_Metadata"


class _Metadata(Protocol):
    shared: int


class StandIn:
    """A Triton driver for a device that is not there: enough to specialise and compile."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_device(self) -> str:
        """Keys Triton's cache of specialised kernels."""
        return self.arch

    def get_current_stream(self, device: str) -> int:
        """No stream: nothing is launched."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return TARGETS[self.arch]


def compile_for(
    handle: str, arch: str, rows: int, out_features: int, in_features: int
) -> Resources:
    """Compiles the kernel named `handle` as a launch with these sizes would, for `arch`.

    Raises UnknownOption for an arch that is not in TARGETS, InvalidHandle, KernelBuildFailed.
    """
    _check_arch(handle, arch)
    loaded = launch.load(handle)
    x, packed, bias, extras, y = _placeholders(loaded.variant, rows, out_features, in_features)
    call = launch.plan(loaded, x, packed, bias, extras, y)
    return _compile(handle, arch, loaded.module, call)


def compile_attention(
    handle: str, arch: str, batch: int, queries: int, keys: int, kernel: str = "kernel"
) -> Resources:
    """Compiles one `kernel` of the attention named `handle` as a call with these sizes would.

    Raises UnknownOption for an arch that is not in TARGETS or a kernel that the call does not
    launch, InvalidHandle, KernelBuildFailed.
    """
    _check_arch(handle, arch)
    driver.set_active(StandIn(arch))  # the plan of a launch may depend on the device
    loaded = attention.load(handle)
    sample = attention.Sample.of(loaded.variant, batch, queries, keys)
    calls = {call.kernel: call for call in SAMPLES[loaded.variant.kernel](loaded, sample)}
    if kernel not in calls:
        raise UnknownOption(option="kernel", value=kernel, known=", ".join(calls))
    return _compile(handle, arch, loaded.module, calls[kernel])


def _check_arch(handle: str, arch: str) -> None:
    if arch not in TARGETS:
        raise UnknownOption(option="arch", value=arch, known=", ".join(TARGETS))
    if knobs.runtime.interpret:
        raise KernelBuildFailed(kernel=handle, rule="TRITON_INTERPRET is set: nothing compiles")


def _compile(handle: str, arch: str, module: ModuleType, call: Call) -> Resources:
    driver.set_active(StandIn(arch))
    kernel = jitted(module, call.kernel)
    try:
        compiled = kernel.warmup(*call.arguments, grid=call.grid, **call.options)
    except TritonError as error:
        raise KernelBuildFailed(kernel=handle, rule=f"{arch}: {error}") from error
    return _read(cast(_Compiled, compiled), arch)


def _placeholders(
    variant: Variant, rows: int, out: int, width: int
) -> tuple[Tensor, list[Tensor], Tensor | None, list[Tensor], Tensor]:
    """x, packed, bias, extras and y of a real call: shapes and dtypes, no memory."""

    def empty(*shape: int, dtype: torch.dtype = variant.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if variant.layout == "nm":
        kept = width // variant.m * variant.n
        index = empty(out, -(-kept * index_bits(variant.m) // 8), dtype=torch.uint8)
        packed = [empty(out, kept), index]
    else:
        bits = empty(out, -(-width // 8), dtype=torch.uint8)
        packed = [empty(out * width // 2), bits, empty(out + 1, dtype=torch.int32)]
    operands = [int(step.operand or 0) for step in variant.steps if step.op in BINARY]
    extras = [empty(rows, out) for _ in range(max(operands, default=-1) + 1)]
    bias = empty(out) if variant.has_bias else None
    return empty(rows, width), packed, bias, extras, empty(rows, out)


def _read(compiled: _Compiled, arch: str) -> Resources:
    is_ptx = arch.startswith("sm_")
    text = compiled.asm["ptx" if is_ptx else "amdgcn"]
    registers, spills, stack = (_ptxas if is_ptx else _amd)(text, arch)
    lines = (text.splitlines(), *(ptx.loops(text) if is_ptx else ([], [])))
    shared = compiled.metadata.shared
    return Resources(arch, registers, spills, stack, shared, *map(_count, lines))


def _count(lines: Iterable[str]) -> dict[str, int]:
    named = (n for line in lines for n, p in INSTRUCTIONS.items() if re.search(p, line))
    return dict(Counter(named))


def _ptxas(text: str, arch: str) -> tuple[int, int, int]:
    """Registers, spilled bytes and stack bytes, by ptxas -v: Triton's metadata lacks them."""
    from triton.backends.nvidia.compiler import get_ptxas  # which one depends on arch and version

    number = TARGETS[arch].arch
    name = f"{arch}a" if int(number) >= 90 else arch
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(text)
        command = [get_ptxas(number).path, "-v", f"--gpu-name={name}", str(path)]
        done = subprocess.run(
            [*command, "-o", str(path.with_suffix(".cubin"))], capture_output=True, text=True
        )
    registers, spills = re.search(r"Used (\d+) registers", done.stderr), _SPILLS.search(done.stderr)
    if registers is None or spills is None:
        raise KernelBuildFailed(kernel=arch, rule=f"ptxas -v said: {done.stderr[:300]}")
    return int(registers[1]), int(spills[2]) + int(spills[3]), int(spills[1])


def _amd(text: str, arch: str) -> tuple[int, int, int]:
    """Vector registers, spilled vector registers and stack bytes, from the assembly's notes."""

    def note(key: str) -> int:
        found = re.search(rf"\.{key}:?\s+(\d+)", text)
        if found is None:
            raise KernelBuildFailed(kernel=arch, rule=f"its assembly has no {key}")
        return int(found[1])

    return note("vgpr_count"), note("vgpr_spill_count"), note("private_segment_fixed_size")
