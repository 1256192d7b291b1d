"""Sparse attention against the best of torch's own on this device: right first, then how fast.

    python benchmarks/attention.py                 a GPU if there is one, else this CPU
    python benchmarks/attention.py --check         numbers only, small sizes; on a machine without a
                                                   GPU also Triton's kernels, in its interpreter
    python benchmarks/attention.py --save FILE     keeps the figures with machine and versions

A share of the key tiles, drawn at random, lies so far below the rest that it is skipped (random
Gaussians never skip); how many tiles were skipped is counted with the operator's meaning. On a GPU
times are medians over CUDA graphs on rotating inputs; dense is the best of SDPA's flash, cuDNN and
efficient backends; flash-sparse-attn is timed where it is installed, with the threshold at which it
skips by the same rule. On a CPU both run in turns, other load meets both.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

if "--check" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks`, when run as a script

from benchmarks import record
from benchmarks.cuda_graph import microseconds
from sparsefx import timing
from sparsefx.api import targets
from sparsefx.attention import meaning
from sparsefx.attention.dense import dense_attention
from sparsefx.attention.probe import Probe, probe
from sparsefx.attention.spec import default_tile
from sparsefx.target import AttentionLowering, AttentionSpec

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
SMALL = 320  # keys of a check
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Work:
    """One line of the table; `goal`: the ratio dense / sparse to reach."""

    method: str
    phase: str
    keys: int
    skipped: float
    goal: float
    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    dim: int = 128

    def spec(self, device: torch.device) -> AttentionSpec:
        """As a graph would have it, causal in prefill."""
        on_gpu = device.type == "cuda"
        is_theta = self.method == "theta"
        return AttentionSpec(
            method=self.method,
            phase=self.phase,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.dim,
            dtype=torch.bfloat16 if on_gpu else torch.float32,
            mask="none",
            is_causal=self.phase == "prefill",
            window=0,
            tile=(0, 0) if is_theta else default_tile(device.type),
            order="sink_diagonal" if self.method == "skip_softmax" else "",
            options=("64", "pre", "exact", "False") if is_theta else (),
            batch=self.batch,
            queries=1 if self.phase == "decode" else self.keys,
            keys=self.keys,
            vary=True,
            sparsity=self.skipped,
        )


GPU = (
    *(Work("skip_softmax", "prefill", keys, 0.0, 0.95) for keys in (16384, 65536, 131072)),
    Work("skip_softmax", "prefill", 65536, 0.7, 1.5),
    Work("skip_softmax", "decode", 65536, 0.7, 1.4, batch=8),
    Work("block", "prefill", 32768, 0.9, 6.0),
    Work("block", "prefill", 32768, 0.5, 1.7),
    Work("theta", "decode", 65536, 0.99, 1.4, batch=8),
)
CPU = (
    *(
        Work("skip_softmax", "prefill", keys, skipped, goal, heads=4, kv_heads=2, dim=dim)
        for dim in (64, 128)
        for keys in (2048, 8192)
        for skipped, goal in ((0.0, 0.9), (0.5, 1.0), (0.7, 1.4), (0.9, 1.4))
    ),
    Work("skip_softmax", "decode", 32768, 0.7, 1.0, heads=9, kv_heads=3, dim=64),
    Work("skip_softmax", "decode", 32768, 0.7, 1.0, heads=32, kv_heads=8),
    Work("block", "prefill", 8192, 0.9, 4.0, heads=4, kv_heads=2, dim=64),
    Work("theta", "decode", 32768, 0.99, 1.0, heads=32, kv_heads=8),
)


def lowerings(work: Work, spec: AttentionSpec) -> Iterator[tuple[str, AttentionLowering]]:
    """The kernels that take this work: the device's, and those of the GPU under --check."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    for name in dict.fromkeys((here, "cuda")) if "--check" in sys.argv else (here,):
        for kernel in targets()[name].attention:
            if kernel.accepts(spec) is None:
                yield kernel.name, kernel.lower(spec)


def run(lowering: AttentionLowering, case: Probe) -> Tensor:
    """One call of the kernel, at any length."""
    result: Tensor = lowering.op(*case.arguments, 0, 0, lowering.handle)
    return result


def error(work: Work, spec: AttentionSpec, lowering: AttentionLowering) -> float:
    """Largest difference from the meaning in float64, over the largest result; small sizes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    case = probe(spec, SMALL, work.skipped, device, groups=2)
    wide = replace(case, q=case.q.double(), k=case.k.double(), v=case.v.double())
    expected = getattr(meaning, f"{spec.method}_attention")(*wide.arguments)
    gap = (run(lowering, case).double() - expected).abs().max()
    return float(gap / expected.abs().max())


def skipped(work: Work, spec: AttentionSpec, device: torch.device) -> float:
    """Share of visible tiles (theta: elements) that the rule skips, on the last tile of queries."""
    case = probe(spec, work.keys, work.skipped, device)
    rows = case.q[:, :, -spec.tile[0] :] if spec.tile[0] else case.q[:, :, -1:]
    s = meaning.scores(rows.float(), case.k.float(), None, *case.seen)
    if spec.method == "theta":
        table = case.method[1]
        assert isinstance(table, Tensor)
        return 1 - float((s > table[:, :1, None]).sum() / (s > -torch.inf).sum())
    if spec.method == "block":
        keep = case.method[0]
        assert isinstance(keep, Tensor)
        return 1 - float(keep.float().mean())
    assert isinstance(case.method[0], Tensor)
    keep = meaning.kept_tiles(s, 1, case.method[0], *spec.tile, spec.order)
    return 1 - float(keep.float().mean())


def gpu_times(work: Work, spec: AttentionSpec, lowering: AttentionLowering) -> dict[str, float]:
    """Microseconds of the kernel ("sparse") and of each competitor that runs."""
    device = torch.device("cuda")
    case = probe(spec, work.keys, work.skipped, device, batch=work.batch, groups=work.kv_heads)
    operands = (case.q, case.k, case.v)

    def with_copy(copy: tuple[Tensor, ...]) -> Tensor:
        return run(lowering, replace(case, q=copy[0], k=copy[1], v=copy[2]))

    def dense(copy: tuple[Tensor, ...]) -> Tensor:
        return dense_attention(copy[0], copy[1], copy[2], None, *case.seen)

    times = {"sparse": microseconds(with_copy, operands)}
    for name, kind in BACKENDS.items():
        with sdpa_kernel(kind):
            times |= _if_it_runs(name, dense, operands)
    return times | _flash_sparse(spec, operands, work.keys)


def _if_it_runs(
    name: str, call: Callable[[tuple[Tensor, ...]], Tensor], operands: tuple[Tensor, ...]
) -> dict[str, float]:
    try:
        return {name: microseconds(call, operands)}
    except RuntimeError as cause:  # as torch says that a backend does not take these inputs
        print(f"  {name}: {str(cause).splitlines()[0]}")
        return {}


def _flash_sparse(spec: AttentionSpec, operands: tuple[Tensor, ...], keys: int) -> dict[str, float]:
    """flash-sparse-attn: [batch, length, heads, dim]; threshold alpha / keys, as our factor."""
    if spec.method != "skip_softmax" or not importlib.util.find_spec("flash_sparse_attn"):
        return {}
    from flash_sparse_attn.ops.triton.interface import flash_sparse_attn_func

    def call(copy: tuple[Tensor, ...]) -> Tensor:
        q, k, v = (each.transpose(1, 2) for each in copy)
        factor = keys * 2.718281828**-15
        result: Tensor = flash_sparse_attn_func(
            q, k, v, is_causal=spec.is_causal, softmax_threshold=factor
        )
        return result

    return _if_it_runs("flash-sparse-attn", call, operands)


def cpu_times(work: Work, spec: AttentionSpec, lowering: AttentionLowering) -> dict[str, float]:
    """Microseconds of the kernel and of SDPA, run in turns."""
    device = torch.device("cpu")
    case = probe(spec, work.keys, work.skipped, device, groups=work.kv_heads)
    took = timing.paired(
        lambda copy: dense_attention(*copy, None, *case.seen),
        lambda copy: run(lowering, replace(case, q=copy[0], k=copy[1], v=copy[2])),
        (case.q, case.k, case.v),
        device,
    )
    return {"sparse": took.second_us, "sdpa": took.first_us}


def main() -> None:
    """Prints a line for each kernel and work; fails if a kernel is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="numbers only, no times")
    parser.add_argument("--save", type=Path, help="JSON file for the figures")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.set_num_threads(options.threads)
    works = GPU if on_gpu else (*CPU, *GPU) if options.check else CPU
    results = [
        line
        for work in works
        for name, lowering in lowerings(work, work.spec(device))
        for line in [_line(work, name, lowering, device, options.check)]
    ]
    if options.save:
        record.write(options.save, {"threads": options.threads}, results)
    if any(line["wrong"] for line in results):
        raise SystemExit("a kernel computes wrong numbers")


@torch.no_grad()
def _line(
    work: Work, name: str, lowering: AttentionLowering, device: torch.device, check: bool
) -> dict[str, object]:
    spec = work.spec(device)
    found = error(work, spec, lowering)
    title = f"{name:28} {work.phase:8} {work.keys:7} keys x {work.batch}, "
    title += f"{work.heads}/{work.kv_heads} heads of {work.dim}"
    wrong = not found < TOLERANCE[spec.dtype]
    line: dict[str, object] = {"work": title, "error": found, "wrong": wrong}
    text = f"{title} error {found:.1e}"
    if not check:
        times = (gpu_times if device.type == "cuda" else cpu_times)(work, spec, lowering)
        rivals = {each: took for each, took in times.items() if each not in ("sparse",)}
        dense = {each: took for each, took in rivals.items() if each != "flash-sparse-attn"}
        best = min(dense, key=lambda each: dense[each])
        ratio = dense[best] / times["sparse"]
        share = skipped(work, spec, device)
        text += f" skipped {share:4.0%} {best} {dense[best]:10.0f} us sparse "
        text += f"{times['sparse']:10.0f} us ratio {ratio:5.2f} (goal {work.goal})"
        line |= {"skipped": share, "times_us": times, "best": best, "ratio": ratio}
        line["goal"] = work.goal
    print(text, flush=True)
    return line


if __name__ == "__main__":
    main()
