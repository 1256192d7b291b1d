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

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.errors import TritonError
from triton.runtime import driver

from sparsefx.codegen.triton import launch, ptx, samples
from sparsefx.codegen.triton.attention import launch as attention
from sparsefx.codegen.triton.attention.samples import SAMPLES
from sparsefx.codegen.triton.form import Call
from sparsefx.codegen.triton.loader import jitted
from sparsefx.errors import KernelBuildFailed, UnknownOption

_OLDEST = 70  # compute capability that Triton compiles for
INSTRUCTIONS = {
    "mma": r"mma\.sync",
    "mma_sp": r"mma\.sp",
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mfma": r"v_mfma_",
    "cp_async": r"cp\.async\.c[ag]",
    "load128": r"ld\.global\S*\.v4\.b32",
    "load": r"ld\.global|global_load|buffer_load",
    "barrier": r"bar\.sync|barrier\.sync",
    "store": r"st\.global|global_store|buffer_store",
    "exp2": r"ex2\.approx|v_exp_f32",
    "local": r"(?:ld|st)\.local|scratch_",
}
_LANES = re.compile(
    r"#ttg\.blocked<\{sizePerThread = \[1, 4\], threadsPerWarp = \[1, 32\], "
    r"warpsPerCTA = \[\d+, \d+\], order = \[1, 0\]\}>"
)
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel needs.

    registers: a thread; spills: bytes stored and loaded (NVIDIA) or registers (AMD); stack: bytes a
    thread; shared: bytes a program; instructions: how many of each of INSTRUCTIONS its PTX or
    AMD assembly holds; looped: how many of these lie in a loop; avoidable: and some iteration
    branches around them (`ptx.loops`; both only for PTX). in_lanes: whether each operand of inline
    PTX gives a lane four neighbours, and a warp 128, as `mma_sp_template` takes for granted.
    """

    arch: str
    registers: int
    spills: int
    stack: int
    shared: int
    instructions: dict[str, int]
    looped: dict[str, int]
    avoidable: dict[str, int]
    in_lanes: bool = True


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
        return gpu_target(self.arch)


def compile_for(
    handle: str,
    arch: str,
    rows: int,
    out_features: int,
    in_features: int,
    kernel: str = "kernel",
) -> Resources:
    """Compiles one `kernel` of `handle` as a launch with these sizes would, for `arch`.

    Raises UnknownOption for an arch that is no GPU's or a kernel that the call does not
    launch, InvalidHandle, KernelBuildFailed.
    """
    _check(handle, arch)
    loaded = launch.load(handle)
    problem = samples.problem(loaded.variant, loaded.form, rows, out_features, in_features)
    calls = {call.kernel: call for call in loaded.calls(problem)}
    if kernel not in calls:
        raise UnknownOption(option="kernel", value=kernel, known=", ".join(calls))
    return _compile(handle, arch, loaded.module, calls[kernel])


def compile_attention(
    handle: str, arch: str, batch: int, queries: int, keys: int, kernel: str = "kernel"
) -> Resources:
    """Compiles one `kernel` of the attention named `handle` as a call with these sizes would.

    Raises UnknownOption for an arch that is no GPU's or a kernel that the call does not
    launch, InvalidHandle, KernelBuildFailed.
    """
    _check(handle, arch)
    driver.set_active(StandIn(arch))  # the plan of a launch may depend on the device
    loaded = attention.load(handle)
    sample = attention.Sample.of(loaded.variant, batch, queries, keys)
    calls = {call.kernel: call for call in SAMPLES[loaded.variant.kernel](loaded, sample)}
    if kernel not in calls:
        raise UnknownOption(option="kernel", value=kernel, known=", ".join(calls))
    return _compile(handle, arch, loaded.module, calls[kernel])


def gpu_target(arch: str) -> GPUTarget:
    """What Triton calls a GPU named sm_90 or gfx942. Raises UnknownOption."""
    found = re.fullmatch(r"sm_(\d{2,3})", arch)
    if found and int(found[1]) >= _OLDEST:
        return GPUTarget("cuda", int(found[1]), 32)
    if re.fullmatch(r"gfx[0-9a-f]{3,4}", arch):
        return GPUTarget("hip", arch, 64 if arch.startswith("gfx9") else 32)
    raise UnknownOption(option="arch", value=arch, known=f"sm_{_OLDEST} and later, gfxNNN")


def _check(handle: str, arch: str) -> None:
    gpu_target(arch)
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


def _read(compiled: _Compiled, arch: str) -> Resources:
    is_ptx = arch.startswith("sm_")
    text = compiled.asm["ptx" if is_ptx else "amdgcn"]
    registers, spills, stack = (_ptxas if is_ptx else _amd)(text, arch)
    lines = (text.splitlines(), *(ptx.loops(text) if is_ptx else ([], [])))
    shared = compiled.metadata.shared
    counts = [_count(each) for each in lines]
    in_lanes = _in_lanes(compiled.asm["ttgir"])
    return Resources(
        arch, registers, spills, stack, shared, counts[0], counts[1], counts[2], in_lanes
    )


def _in_lanes(text: str) -> bool:
    """Of Triton's GPU dialect: the layout of every operand and result of inline assembly."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", text, re.M))
    lines = [line for line in text.splitlines() if "tt.elementwise_inline_asm" in line]
    used = {name for line in lines for name in re.findall(r"(#\w+)>", line.rpartition('"')[2])}
    return all(_LANES.fullmatch(layouts[name]) for name in used)


def _count(lines: Iterable[str]) -> dict[str, int]:
    named = (n for line in lines for n, p in INSTRUCTIONS.items() if re.search(p, line))
    return dict(Counter(named))


def _ptxas(text: str, arch: str) -> tuple[int, int, int]:
    """Registers, spilled bytes and stack bytes, by ptxas -v: Triton's metadata lacks them."""
    from triton.backends.nvidia.compiler import get_ptxas  # which one depends on arch and version

    number = gpu_target(arch).arch
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
