"""Generated C++ linears against F.linear on this CPU: ratio of times, above 1 where sparse wins.

    python benchmarks/cpu_linear.py [--threads 2] [--pairs 41] [--shape 4096x4096]

Weights rotate through more memory than the last-level cache holds, as in decoding. Dense and sparse
run in turn, so that other load on the machine hits both; the ratio is the median over the pairs.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefx.codegen.cpp import TARGET_KERNELS
from sparsefx.codegen.cpp.isa import best
from sparsefx.formats import pack_bitmap, pack_nm
from sparsefx.spec import NM, Unstructured
from sparsefx.target import LinearSpec, Lowering

SHAPES = ((1536, 576), (576, 1536), (4096, 4096))
PATTERNS = (NM(2, 4), Unstructured(0.5), Unstructured(0.8), Unstructured(0.9))
CACHE_BYTES = 96 << 20


def main() -> None:
    """Prints a table: a line for each shape, type and pattern, a column for each row count."""
    options = _options()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    rows = (1, 8, 64)
    print(
        f"torch {torch.__version__}, {options.threads} threads, {best().name}; dense / sparse time"
    )
    print(f"{'out x in':12}{'dtype':10}{'pattern':18}" + "".join(f"{f'M={m}':>24}" for m in rows))
    shapes = [shape for shape in SHAPES if options.shape in ("", f"{shape[0]}x{shape[1]}")]
    for shape, dtype in product(shapes, (torch.float32, torch.bfloat16)):
        for pattern in PATTERNS:
            cells = [_cell(shape, dtype, pattern, m, options.pairs) for m in rows]
            head = f"{shape[0]}x{shape[1]:<7}{str(dtype)[6:]:10}{pattern!s:18}"
            print(head + "".join(f"{cell:>24}" for cell in cells), flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pairs", type=int, default=41, help="timings of each dense and sparse")
    parser.add_argument("--shape", default="", help="only this shape, e.g. 4096x4096")
    return parser.parse_args()


@torch.inference_mode()
def _cell(
    shape: tuple[int, int], dtype: torch.dtype, pattern: NM | Unstructured, rows: int, pairs: int
) -> str:
    weight = torch.randn(shape).to(dtype)
    weight = weight * pattern.keep(weight.abs().float())
    lowering = _lower(weight, pattern, rows)
    copies = CACHE_BYTES // weight.nbytes + 2
    dense = [weight.clone() for _ in range(copies)]
    # As many bytes as dense, so that no sparse weight is still in the cache either.
    stored = sum(tensor.nbytes for tensor in lowering.packed)
    packed = [[t.clone() for t in lowering.packed] for _ in range(CACHE_BYTES // stored + 2)]
    x = torch.randn(rows, shape[1]).to(dtype)

    def run_sparse(i: int) -> Tensor:
        return lowering.run(x, packed=packed[i % len(packed)])

    times = list(_pairs(lambda i: F.linear(x, dense[i % copies]), run_sparse, pairs))
    ratio = statistics.median(a / b for a, b in times)
    dense_us, sparse_us = (statistics.median(t) * 1e6 for t in zip(*times, strict=True))
    return f"{ratio:.2f} ({dense_us:.0f}/{sparse_us:.0f} us)"


def _lower(weight: Tensor, pattern: NM | Unstructured, rows: int) -> Lowering:
    is_nm = isinstance(pattern, NM)
    n, m = (pattern.n, pattern.m) if isinstance(pattern, NM) else (0, 0)
    packed = tuple(pack_nm(weight, n, m)) if is_nm else tuple(pack_bitmap(weight))
    density = 1 - pattern.sparsity
    spec = LinearSpec(
        "nm" if is_nm else "bitmap", *weight.shape, n, m, density, weight.dtype,
        has_bias=False, epilogue="", rows=rows, rows_vary=False,
    )  # fmt: skip
    kernel = next(kernel for kernel in TARGET_KERNELS if kernel.accepts(spec) is None)
    return kernel.lower(spec, packed)


def _pairs(
    dense: Callable[[int], Tensor], sparse: Callable[[int], Tensor], count: int
) -> Iterator[tuple[float, float]]:
    """Seconds of (dense, sparse), one after the other; three untimed calls of each come first."""
    for i in range(count + 3):
        times = []
        for run in (dense, sparse):
            start = time.perf_counter()
            run(i)
            times.append(time.perf_counter() - start)
        if i >= 3:
            yield times[0], times[1]


if __name__ == "__main__":
    main()
