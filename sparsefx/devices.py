"""What the roofline and the guard know of a device: peak speeds, last-level cache, a name for keys.

Speeds of GPUs are those of the public datasheets, dense (not "with sparsity"): "NVIDIA A100 Tensor
Core GPU" (2021), "NVIDIA H100 Tensor Core GPU" (2023), "NVIDIA H200 Tensor Core GPU" (2024),
"NVIDIA L4 Tensor Core GPU" (2023).
"""

import functools
import importlib.util
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from sparsefx import diskcache
from sparsefx.errors import UnknownOption

MEGABYTE = 2**20


@dataclass(frozen=True)
class Device:
    """Speeds of one device: multiplications plus additions a second by dtype, bytes a second.

    `launch_ns` is the fixed cost of one operator in nanoseconds. It is an estimate, not a datasheet
    figure; dense and sparse pay it alike, so it shortens ratios and never turns them round.
    """

    name: str
    fp32: int
    fp16: int
    bf16: int
    bandwidth: int
    launch_ns: int

    def peak(self, dtype: torch.dtype) -> int:
        """FLOP/s at `dtype`; float64 counts as half of float32, other dtypes as float32."""
        match dtype:
            case torch.float16:
                return self.fp16
            case torch.bfloat16:
                return self.bf16
            case torch.float64:
                return self.fp32 // 2
            case _:
                return self.fp32


# fp32 is the rate of the CUDA cores: PyTorch leaves TF32 off by default. fp16 and bf16 are dense
# rates of tensor cores; the H100, H200 and L4 datasheets print only the sparse ones, twice those.
# Bandwidth is that of the device memory. 3 us: one kernel launch, hidden in part by CUDA graphs.
GPUS = (
    #      name     fp32              fp16                bf16                bytes/s            ns
    Device("A100", 19_500 * 10**9, 312_000 * 10**9, 312_000 * 10**9, 2_039 * 10**9, 3_000),
    Device("H100", 67_000 * 10**9, 989_500 * 10**9, 989_500 * 10**9, 3_350 * 10**9, 3_000),
    Device("H200", 67_000 * 10**9, 989_500 * 10**9, 989_500 * 10**9, 4_800 * 10**9, 3_000),
    Device("L4", 30_300 * 10**9, 121_000 * 10**9, 121_000 * 10**9, 300 * 10**9, 3_000),
)
# Two cores at 2 GHz with two 8-wide FMA units each reach 2 * 2e9 * 32 = 128 GFLOP/s, of which a
# matrix product gets some 80 %; 16-bit ones run in float32 where the CPU has no unit for them. Two
# cores draw some 20 GB/s from DDR4. Used where no cache folder is given, so that a plan is the same
# on every machine.
FALLBACK_CPU = Device("cpu", 100 * 10**9, 100 * 10**9, 100 * 10**9, 20 * 10**9, 5_000)


def named(name: str, cache: Path | None = None) -> Device:
    """The device called `name`: "A100" (80 GB), "H100", "H200" (all SXM), "L4" or "cpu"; any case.

    "cpu" is this machine with torch's present number of threads: probed once in about half a second
    and kept in `cache`; with `cache=None` it is FALLBACK_CPU. Raises UnknownOption.
    """
    if name.lower() == "cpu":
        return _probed_cpu(cache, device_key("cpu")) if cache else FALLBACK_CPU
    for gpu in GPUS:
        if gpu.name.lower() == name.lower():
            return gpu
    known = ", ".join((*(gpu.name for gpu in GPUS), "cpu"))
    raise UnknownOption(option="device", value=name, known=known)


def nearest(device: torch.device | str) -> str:
    """The name, for `named`, of the torch device at hand.

    A GPU that is absent or not in the table counts as an A100, the slowest of its training cards.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return "cpu"
    here = torch.cuda.get_device_name(device) if torch.cuda.is_available() else ""
    words = here.replace("-", " ").split()  # "NVIDIA A100-SXM4-80GB"
    return next((gpu.name for gpu in GPUS if gpu.name in words), "A100")


def device_key(device: torch.device | str) -> str:
    """What of the device decides a time: CPU model, number of its features, threads; or the GPU."""
    device = torch.device(device)
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}"
    model, features = _cpu_model()
    return f"{model}, {features} features, {torch.get_num_threads()} threads"


def surroundings(device: torch.device | str) -> dict[str, str]:
    """All that a timing depends on beside the kernel: device, threads, versions."""
    return {
        "device": device_key(device),
        "threads": str(torch.get_num_threads()),
        "torch": str(torch.__version__),
        "triton": _triton_version(),
    }


@functools.cache
def _triton_version() -> str:
    return version("triton") if importlib.util.find_spec("triton") else ""


def last_level_cache(device: torch.device | str) -> int:
    """Bytes of the largest cache of the device; 32 MB where the system does not tell."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    folder = Path("/sys/devices/system/cpu/cpu0/cache")
    sizes = [_bytes(path.read_text()) for path in folder.glob("index*/size")]
    return max(sizes, default=0) or 32 * MEGABYTE


def _bytes(text: str) -> int:
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    text = text.strip()
    digits = text.rstrip("KMG")
    return int(digits) * units.get(text[-1:], 1) if digits.isdigit() else 0


@functools.cache
def _cpu_model() -> tuple[str, int]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return platform.processor() or platform.machine(), 0
    lines = [line.partition(":") for line in text.split("\n\n")[0].splitlines()]
    facts = {label.strip().lower(): value.strip() for label, _, value in lines}
    model = facts.get("model name") or platform.machine()
    return model, len((facts.get("flags") or facts.get("features", "")).split())


@functools.cache
def _probed_cpu(cache: Path, key: str) -> Device:
    labels = {"probe": "cpu speeds, 1", "device": key, "torch": str(torch.__version__)}
    found = diskcache.recall(cache / "devices", labels) or {}
    speeds = {field: diskcache.number(found.get(field)) for field in _SPEEDS}
    if not all(speeds.values()):
        probed = _probe()
        diskcache.remember(cache / "devices", labels, asdict(probed))
        return probed
    whole = {field: int(speed or 0) for field, speed in speeds.items()}
    return Device(name="cpu", launch_ns=FALLBACK_CPU.launch_ns, **whole)


_SPEEDS = ("fp32", "fp16", "bf16", "bandwidth")


def _probe() -> Device:
    """Best of several runs of a square product in each dtype and a matrix-vector product."""
    rows = min(max(4 * last_level_cache("cpu"), 64 * MEGABYTE), 256 * MEGABYTE) // 4096
    matrix, vector = torch.ones(rows, 1024), torch.ones(1024)
    bandwidth = matrix.nbytes / _best_seconds(lambda: matrix @ vector)
    return Device(
        name="cpu",
        fp32=_flops(torch.float32),
        fp16=_flops(torch.float16),
        bf16=_flops(torch.bfloat16),
        bandwidth=int(bandwidth),
        launch_ns=FALLBACK_CPU.launch_ns,
    )


def _flops(dtype: torch.dtype, size: int = 512) -> int:
    square = torch.ones(size, size, dtype=dtype)
    return int(2 * size**3 / _best_seconds(lambda: square @ square))


def _best_seconds(run: Callable[[], Tensor], limit: float = 0.12) -> float:
    times: list[float] = []
    with torch.no_grad():
        run()
        deadline = time.perf_counter() + limit
        while not times or time.perf_counter() < deadline:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return min(times)
