"""Generated C++ attention against torch's on this CPU: ratio of times, above 1 where sparse wins.

    python benchmarks/cpu_attention.py [--threads 2] [--pairs 7] [--only prefill]

A share of the key tiles, drawn at random for each KV head, is pushed along one direction of the
queries so far down that they are skipped; what was skipped is counted, not assumed. Dense and
sparse run in turn, so that other load on the machine hits both; the ratio is the median over the
pairs.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from sparsefx.attention.dense import dense_attention
from sparsefx.codegen.cpp.attention.call import run_counted
from sparsefx.codegen.cpp.attention.kernels import ATTENTION_KERNELS
from sparsefx.codegen.cpp.isa import best
from sparsefx.target import AttentionLowering, AttentionSpec

TILE = 64
SHARES = (0.0, 0.5, 0.7, 0.9)
PUSH = 14.0  # of queries up and of skipped keys down, along one dimension


@dataclass(frozen=True)
class Work:
    """One attention: sizes and layout; `method` is "skip_softmax" or "block"."""

    heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int
    method: str = "skip_softmax"
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        phase = "decode" if self.queries == 1 else "prefill"
        sizes = f"{self.keys:6} keys, {self.heads}/{self.kv_heads} heads of {self.dim}"
        return f"{phase:8}{self.method:13}{str(self.dtype)[6:]:9}{sizes}"


PREFILL = [Work(2, 1, keys, keys, dim) for keys, dim in product((2048, 4096, 8192), (64, 128))]
PREFILL += [Work(2, 1, 8192, 8192, 64, "block"), Work(2, 1, 4096, 4096, 64, dtype=torch.bfloat16)]
DECODE = [
    Work(heads, kv_heads, 1, keys, dim)
    for keys in (8192, 32768)
    for heads, kv_heads, dim in ((9, 3, 64), (32, 8, 128))
]


def main() -> None:
    """Prints a table: a line for each work and number of threads, a column for each share."""
    options = _options()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {best().name}; dense / sparse time (sparse ms, skipped)")
    print(f"{'':60}" + "".join(f"{f'{share:.0%} of tiles':>26}" for share in SHARES))
    works = {"prefill": PREFILL, "decode": DECODE, "": PREFILL + DECODE}[options.only]
    for work, threads in product(works, options.threads):
        torch.set_num_threads(threads)
        cells = [_cell(work, share, options.pairs) for share in SHARES]
        line = f"{work!s:57}{threads:2} " + "".join(f"{cell:>26}" for cell in cells)
        print(line, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pairs", type=int, default=7, help="timings of each dense and sparse")
    parser.add_argument("--only", choices=("prefill", "decode", ""), default="")
    return parser.parse_args()


@torch.inference_mode()
def _cell(work: Work, share: float, pairs: int) -> str:
    q, k, v, skipped = _operands(work, share)
    lowering = _lower(work)
    scale = work.dim**-0.5
    seen = (True, scale, 0, TILE, TILE)
    if work.method == "block":
        keep = ~skipped[:, :, None].expand(1, work.kv_heads, -(-work.queries // TILE), -1)
        method, seen = (keep.repeat_interleave(work.heads // work.kv_heads, 1).contiguous(),), seen
    else:
        factor = torch.full((work.heads,), math.exp(-8) * work.keys)
        method, seen = (factor, factor), (*seen, "sink_diagonal")
    arguments = (q, k, v, None, *method, *seen, 0, 0, lowering.handle)
    _, count = run_counted(lowering.op, *arguments)
    visible = _visible_tiles(work) * work.heads
    ratios, sparse = _compare(
        lambda: dense_attention(q, k, v, None, True, scale, 0),
        lambda: lowering.op(*arguments),
        pairs,
    )
    skip = 1 - int(count.sum()) / visible
    return f"{ratios:.2f} ({sparse * 1e3:.2f} ms, {skip:.0%})"


def _operands(work: Work, share: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v as models lay them out, and which key tiles are pushed down, [1, kv_heads, tiles]."""

    def heads(number: int, length: int) -> Tensor:
        return torch.randn(1, length, number, work.dim).transpose(1, 2)

    q, k, v = heads(work.heads, work.queries), *(heads(work.kv_heads, work.keys) for _ in "kv")
    tiles = -(-work.keys // TILE)
    skipped = torch.rand(1, work.kv_heads, tiles).argsort(-1) < round(share * tiles)
    skipped[..., 0] = False  # the first tile cannot be
    q[..., 0] += PUSH
    k[..., 0] -= PUSH * skipped.repeat_interleave(TILE, -1)[..., : work.keys]
    return q.to(work.dtype), k.to(work.dtype), v.to(work.dtype), skipped


def _visible_tiles(work: Work) -> int:
    """Tiles of a head in which a row sees a key."""
    if work.queries == 1:
        return -(-work.keys // TILE)
    return sum(range(1, work.queries // TILE + 1))


def _lower(work: Work) -> AttentionLowering:
    phase = "decode" if work.queries == 1 else "prefill"
    order = "sink_diagonal" if work.method == "skip_softmax" else ""
    spec = AttentionSpec(
        work.method, phase, work.heads, work.kv_heads, work.dim, work.dtype, "none",
        is_causal=True, window=0, tile=(TILE, TILE), order=order, options=(), batch=1,
        queries=work.queries, keys=work.keys, vary=False, sparsity=None,
    )  # fmt: skip
    kernel = next(kernel for kernel in ATTENTION_KERNELS if kernel.accepts(spec) is None)
    return kernel.lower(spec)


def _compare(
    dense: Callable[[], Tensor], sparse: Callable[[], Tensor], pairs: int
) -> tuple[float, float]:
    """Median of dense / sparse time, and of the sparse time in seconds; two untimed calls first."""
    ratios, seconds = [], []
    for i in range(pairs + 2):
        times = []
        for run in (dense, sparse):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        if i >= 2:
            ratios.append(times[0] / times[1])
            seconds.append(times[1])
    return statistics.median(ratios), statistics.median(seconds)


if __name__ == "__main__":
    main()
