"""What pruning costs as calibration data and models grow: measured on SmolLM2, computed for 8B.

    python benchmarks/prune_scaling.py --json benchmarks/results/prune-scaling-cpu.json

First, seconds of SparseGPT at 50 % over three numbers of tokens, and over three numbers of layers.
Then a table for Llama-3-8B's shape on one GPU of 80 GB. That table is **computed**: each phase of
the work has its share of this machine's peak speed, measured here, and is taken to reach the same
share of the GPU's datasheet peak; kernels that are too small for that cost their launch.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `examples`, when run as a script

import sparsefx
from benchmarks import record
from benchmarks.memory import peak_memory
from examples.real_models import smollm2, wikipedia_text
from sparsefx import devices
from sparsefx.calibrate.statistics import Gram
from sparsefx.patterns import Unstructured
from sparsefx.prune.sparsegpt import prune_and_update

HALF = Unstructured(0.5, sparsefx.SparseGPT())
GIB = 2**30


def seconds_of(samples: int, layers: int, length: int = 512) -> float:
    """Of `sparsify` alone."""
    model, tokenizer = smollm2(layers=layers)
    ids = torch.tensor(tokenizer(wikipedia_text())["input_ids"][: samples * length])
    batches = [{"input_ids": each[None], "use_cache": False} for each in ids.view(samples, length)]
    recipe = sparsefx.Recipe({"model.layers.*": HALF})
    return timed(lambda: sparsefx.sparsify(model, recipe, batches, inplace=True, progress=False))


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@dataclass(frozen=True)
class Shares:
    """What the phases reach of the peak FLOP/s of float32, and the operators of one column."""

    peak: int
    forward: float
    gram: float
    solve: float
    operators: float
    solve_bytes: float
    """Peak beyond the weight and its Gram, as a multiple of a Gram of the weight's size."""


class _Counting(TorchDispatchMode):
    """Counts operators, which on a GPU are launches."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:  # Any: as torch declares it
        self.count += 1
        return func(*args, **(kwargs or {}))


def shares(rows: int = 2048, width: int = 2048, out: int = 2048) -> Shares:
    """Measured at a size at which arithmetic prevails, in float32, the best of three."""
    with tempfile.TemporaryDirectory() as cache:
        peak = devices.named("cpu", Path(cache)).fp32  # probed now
    x, weight = torch.randn(rows, width), torch.randn(out, width)
    gram = Gram(width, x.device)
    gram.add(x, 1)

    def best(work: Callable[[], object]) -> float:
        return min(timed(work) for _ in range(3))

    forward = 2 * rows * width * out / best(lambda: x @ weight.T) / peak
    added = rows * width * (width + Gram.BAND) / best(lambda: gram.add(x, 1)) / peak
    with peak_memory() as memory:
        solving = best(lambda: prune_and_update(weight, HALF, gram.gram, sparsefx.SparseGPT()))
    with _Counting() as counting:
        prune_and_update(weight[:256, :512], HALF, gram.gram[:512, :512], sparsefx.SparseGPT())
    held = max(0.0, memory[0] / (4 * width * width))
    solve = solve_flops(width, out) / solving / peak
    return Shares(peak, forward, added, solve, counting.count / 512, held)


def solve_flops(width: int, out: int) -> float:
    """Of the sweep, out * width^2, and of factor and inverse, width^3 / 3 each."""
    return out * width**2 + 2 * width**3 / 3


# Llama-3-8B: (input size, output sizes that share it) of a block.
BLOCK = ((4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,)))
LAYERS, WEIGHTS, HIDDEN = 32, 8_030_261_248, 4096


@dataclass(frozen=True)
class Expected:
    """Computed for one GPU: seconds of each phase, and GiB at the peak."""

    gpu: str
    tokens: int
    forward: float
    gram: float
    solve: float
    launches: float
    gib: float

    @property
    def minutes(self) -> float:
        """Of all phases."""
        return (self.forward + self.gram + self.solve + self.launches) / 60

    def __str__(self) -> str:
        return (
            f"{self.gpu:<8}{self.tokens:>9}{self.forward:>9.0f}{self.gram:>7.0f}{self.solve:>7.0f}"
            f"{self.launches:>10.0f}{self.minutes:>9.1f}{self.gib:>7.1f}"
        )


HEAD = (
    f"{'GPU':<8}{'tokens':>9}{'forward':>9}{'Gram':>7}{'solve':>7}{'launches':>10}{'minutes':>9}"
    f"{'GiB':>7}"
)


def expected(gpu: str, tokens: int, measured: Shares) -> Expected:
    """Two forward passes of the linears in bfloat16, Grams and solving in float32, all launches.

    The scores of attention are left out: up to 7 % of a forward pass at 2,048 tokens.
    """
    device = devices.named(gpu)
    parameters = sum(width * sum(outs) for width, outs in BLOCK) * LAYERS
    forward = 2 * 2 * parameters * tokens / (device.bf16 * measured.forward)
    added = sum(tokens * width * (width + Gram.BAND) for width, _ in BLOCK) * LAYERS
    solving = sum(solve_flops(width, out) for width, outs in BLOCK for out in outs) * LAYERS
    columns = sum(width * len(outs) for width, outs in BLOCK) * LAYERS
    grams = 4 * sum(width**2 for width, _ in BLOCK)
    largest = max(width for width, _ in BLOCK)
    held = measured.solve_bytes * 4 * largest**2 + 4 * largest * max(BLOCK[-1][1])
    activations = 2 * 2 * tokens * HIDDEN  # into the block and out of it, bfloat16
    return Expected(
        device.name,
        tokens,
        forward,
        added / (device.fp32 * measured.gram),
        solving / (device.fp32 * measured.solve),
        columns * measured.operators * device.launch_ns / 1e9,
        (2 * WEIGHTS + grams + held + activations) / GIB,
    )


def main() -> None:
    """Prints both tables, and keeps them if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="keep the figures here")
    args = parser.parse_args()
    results: list[dict[str, object]] = []
    print(f"{'samples':>8}{'layers':>8}{'seconds':>9}", flush=True)
    for samples, layers in ((8, 30), (16, 30), (32, 30), (16, 10), (16, 20)):
        seconds = seconds_of(samples, layers)
        print(f"{samples:>8}{layers:>8}{seconds:>9.1f}", flush=True)
        results.append({"samples": samples, "layers": layers, "seconds": seconds})
    measured = shares()
    print(f"\nLlama-3-8B, computed from {measured}\n{HEAD}")
    results.append(asdict(measured))
    for gpu in ("A100", "H100"):
        for tokens in (32 * 512, 128 * 2048):
            found = expected(gpu, tokens, measured)
            print(found)
            results.append(asdict(found) | {"minutes": found.minutes})
    if args.json:
        record.write(args.json, {}, results)


if __name__ == "__main__":
    main()
