"""Sparse linears of the CUDA target against torch's dense bf16 linear: right first, then how fast.

    python benchmarks/gpu_linear.py                 on a CUDA machine: errors and times
    python benchmarks/gpu_linear.py --cpu           anywhere: small shapes in Triton's interpreter

Times are medians over replays of a CUDA graph that runs over copies of the weight which together
exceed the L2 cache twice, so that every weight comes from memory, as it does inside a model.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if "--cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks`, when run as a script

from benchmarks.cuda_graph import microseconds
from sparsefx import formats
from sparsefx.codegen.triton import TritonLinear
from sparsefx.spec import NM, Unstructured
from sparsefx.target import LinearSpec

SEED = 7
GPU_SHAPES = ((1536, 576), (4096, 4096), (14336, 4096), (4096, 14336))
GPU_ROWS = (1, 16, 64, 512)
CPU_SHAPES = ((96, 128), (72, 80))
CPU_ROWS = (1, 40)
PATTERNS: dict[str, NM | Unstructured] = {
    "2:4": NM(2, 4),
    "1:4": NM(1, 4),
    "2:8": NM(2, 8),
    "4:8": NM(4, 8),
    "50%": Unstructured(0.5),
    "80%": Unstructured(0.8),
}
TOLERANCE = 0.02


@dataclass(frozen=True)
class Trial:
    """One sparse linear: the dense weight it stands for and how to call it."""

    weight: Tensor
    packed: tuple[Tensor, ...]
    run: Callable[[Tensor, tuple[Tensor, ...]], Tensor]

    def error(self, x: Tensor) -> float:
        """Largest difference from float64, over the largest result."""
        expected = F.linear(x.double(), self.weight.double())
        difference = self.run(x, self.packed).double() - expected
        return float(difference.abs().max() / expected.abs().max())


def trial(pattern: NM | Unstructured, weight: Tensor, rows: int) -> Trial:
    """Prunes and packs `weight` [out, in] and lowers the linear."""
    out, width = weight.shape
    weight = weight * pattern.keep(weight.abs())
    layout, n, m = "bitmap", 0, 0
    packed: tuple[Tensor, ...] = formats.pack_bitmap(weight)
    if isinstance(pattern, NM):
        layout, n, m = "nm", pattern.n, pattern.m
        packed = formats.pack_nm(weight, n, m)
    density = 1 - pattern.sparsity
    spec = LinearSpec(layout, out, width, n, m, density, weight.dtype, False, "", rows, False)
    kernel = TritonLinear(layout)
    reason = kernel.accepts(spec)
    if reason:
        raise SystemExit(f"{pattern} is declined: {reason}")
    lowering = kernel.lower(spec, tuple(packed))

    def run(x: Tensor, packed: tuple[Tensor, ...]) -> Tensor:
        result: Tensor = lowering.run(x, packed=packed)
        return result

    return Trial(weight, lowering.packed, run)


def _dense(x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    return F.linear(x, weights[0])


def table(device: str, dtype: torch.dtype) -> bool:
    """Prints a line for each shape, number of rows and pattern; whether all were right."""
    on_gpu = device == "cuda"
    generator = torch.Generator().manual_seed(SEED)
    head = f"{'out x in @ rows':>22} {'weight':>6} {'error':>8}"
    print(head + (f" {'dense us':>9} {'sparse us':>9} {'speedup':>7}" if on_gpu else ""))
    right = True
    for out, width in GPU_SHAPES if on_gpu else CPU_SHAPES:
        weight = torch.randn(out, width, generator=generator).to(device, dtype)
        for rows in GPU_ROWS if on_gpu else CPU_ROWS:
            x = torch.randn(rows, width, generator=generator).to(device, dtype)
            dense = microseconds(partial(_dense, x), (weight,)) if on_gpu else 0.0
            for name, pattern in PATTERNS.items():
                sparse = trial(pattern, weight, rows)
                error = sparse.error(x)
                right &= error < TOLERANCE
                line = f"{f'{out} x {width} @ {rows}':>22} {name:>6} {error:8.1e}"
                if on_gpu:
                    took = microseconds(partial(sparse.run, x), sparse.packed)
                    line += f" {dense:9.1f} {took:9.1f} {dense / took:7.2f}"
                print(line, flush=True)
    return right


def main() -> None:
    """Checks, and on a GPU times, all patterns and shapes."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cpu", action="store_true", help="check numbers only, on the CPU")
    cpu = parser.parse_args().cpu
    if not cpu and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: pass --cpu to check the numbers in the interpreter")
    name = "Triton's interpreter" if cpu else torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, seed {SEED}")
    # Triton's interpreter does not compute bfloat16
    if not table("cpu" if cpu else "cuda", torch.float16 if cpu else torch.bfloat16):
        raise SystemExit(f"an error is {TOLERANCE} or more")


if __name__ == "__main__":
    main()
