"""Packed linears on this CPU against the best dense one of the same value type: errors, then times.

    python benchmarks/cpu.py --quick                    4096 x 4096, 1 and 8 rows: the goals' rows
    python benchmarks/cpu.py --json benchmarks/results/cpu-NAME.json       shapes, 1 to 8192 rows

Value types: fp32, bf16; int8: against onnxruntime's dynamic int8, weights int8 and x quantised at
run time ("int8_dynamic") or not ("int8"); int4, a scale for each 32, against MatMulNBits. All of a
group run in turns (`turns.py`) on weights that are not in the cache. ratio: dense / sparse.
fraction: of the least time any kernel could take by this machine's measured speeds; `in_cache_us`:
the same kernel on an eighth of the rows of W, again and again, times eight: what it would take if
memory cost nothing.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks`, when run as a script

from benchmarks import dense_cpu, dense_ort, peaks, record, turns
from benchmarks.packed import PATTERNS, TOLERANCE, Packed, Storage, Stored
from sparsefx import guard
from sparsefx.codegen.cpp import TARGET_KERNELS

SEED = 7
CPU = torch.device("cpu")
DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.float32,
    "int4": torch.float32,
}
SHAPES = ((4096, 4096), (1536, 576), (576, 1536), (768, 768), (3072, 768), (768, 3072))
ROWS = (1, 4, 8, 16, 64, 256, 1024, 8192)
# A dense product beyond so much FLOP is timed against a few patterns only, without quantised ones.
LARGE = 36 * 10**9
LARGE_PATTERNS = ("2:4", "bitmap 90 %", "block 64x64 80 %")
QUICK = {
    "fp32": ("bitmap 50 %", "bitmap 80 %", "bitmap 90 %"),
    "bf16": ("2:4",),
    "int8": ("2:4",),
}
GUARDED = ("2:4", "bitmap 80 %")  # where the full table asks the guard too, a tenth of a second
CHECKED = 16  # rows of x whose numbers are compared
SHARE = 8  # the kernel in cache runs on this part of the rows of W


@dataclass(frozen=True)
class Result:
    """A line of the table; times in microseconds, None where no kernel takes the weight (`reason`).

    dense: the best one, of dense_us by name. guard: what the guard would run by a measurement of
    its own. bound: what the roofline is bound by.
    """

    shape: str
    value_type: str
    values: str
    pattern: str
    rows: int
    dense: str
    dense_us: dict[str, float]
    csr_us: float | None = None
    sparse_us: float | None = None
    ratio: float | None = None
    kernel: str = ""
    error: float | None = None
    roofline_us: float | None = None
    fraction: float | None = None
    bound: str = ""
    in_cache_us: float | None = None
    guard: str = ""
    reason: str = ""

    def __str__(self) -> str:
        dense = f"{self.dense_us[self.dense]:>10.0f}  {self.dense:<24}"
        head = f"{self.shape:<11}{self.value_type:<5}{self.pattern:<17}{self.values:<13}"
        if self.ratio is None:
            return f"{head}{self.rows:>5}{dense}  {self.reason}"
        return (
            f"{head}{self.rows:>5}{dense}{self.sparse_us:>8.0f}{self.ratio:>7.2f}"
            f"{self.fraction:>9.0%} {self.bound:<11}{self.in_cache_us or 0:>8.0f}  {self.guard:<7}"
            f"{self.kernel}"
        )


HEAD = (
    f"{'out x in':<11}{'type':<5}{'pattern':<17}{'values':<13}{'rows':>5}{'dense us':>10}  "
    f"{'by':<24}{'us':>8}{'ratio':>7}{'roofline':>9} {'bound by':<11}{'cached':>8}  guard  kernel"
)


def main(arguments: list[str] | None = None) -> None:
    """Prints a line for each shape, value type, pattern and number of rows."""
    options = _options(arguments)
    torch.manual_seed(SEED)
    speeds = peaks.cpu()
    print("\n".join(f"{key}: {value}" for key, value in record.machine().items()))
    print(f"{speeds}\n{HEAD}")
    results = []
    for group in groups(options):
        for result in measure(group, speeds):
            print(result, flush=True)
            results.append(asdict(result))
    if options.json:
        said = {key: value for key, value in vars(options).items() if key != "json"}
        record.write(options.json, {**said, "peaks": asdict(speeds)}, results)
    wrong = [result for result in results if (result["error"] or 0) > TOLERANCE[torch.bfloat16]]
    if wrong:
        raise SystemExit(f"{len(wrong)} kernels compute wrong numbers, such as {wrong[0]}")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="only what the goals speak of")
    parser.add_argument("--shape", nargs="+", default=None, help="such as 4096x4096")
    parser.add_argument("--rows", type=int, nargs="+", default=None)
    parser.add_argument("--type", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--pattern", nargs="+", default=None, choices=PATTERNS)
    parser.add_argument("--seconds", type=float, default=1.0, help="aim of a group of sides")
    parser.add_argument("--json", type=Path, help="keep machine, versions and figures here")
    return parser.parse_args(arguments)


def storages(value_type: str, patterns: Sequence[str]) -> list[Storage]:
    """The ways to store a weight of a value type."""
    kinds = {"int8": (("int8_dynamic", 0), ("int8", 0)), "int4": (("int4", dense_ort.INT4_BLOCK),)}
    kept = kinds.get(value_type, (("", 0),))
    return [Storage(pattern, *kind) for pattern in patterns for kind in kept]


@dataclass(frozen=True)
class Group:
    """What runs in turns: one shape, value type and number of rows, dense and in every pattern."""

    value_type: str
    weight: Tensor
    inductor: dense_cpu.Linear
    chains: dense_ort.Chains
    stored: list[Stored]
    rows: int
    seconds: float
    quick: bool


def groups(options: argparse.Namespace) -> Iterator[Group]:
    """Shape by shape: the weights of one at a time are in memory."""
    shapes = [tuple(map(int, text.split("x"))) for text in options.shape or ()]
    quick = options.quick
    for shape in shapes or (SHAPES[:1] if quick else SHAPES):
        weight = torch.randn(shape)
        chains = dense_ort.Chains(weight)
        for value_type in options.type:
            typed = weight.to(DTYPES[value_type])
            patterns = options.pattern or (QUICK.get(value_type, ()) if quick else PATTERNS)
            fitting = [name for name in patterns if not PATTERNS[name].misfit(typed.shape)]
            stored = [Stored.of(each, typed) for each in storages(value_type, fitting)]
            rivals = (dense_cpu.compiled(), chains)
            for rows in options.rows or ((1, 8) if quick else ROWS):
                kept = stored
                if 2 * typed.numel() * rows > LARGE:
                    kept = [each for each in stored if _is_plain_large(each.storage)]
                if kept:
                    yield Group(value_type, typed, *rivals, kept, rows, options.seconds, quick)


def _is_plain_large(storage: Storage) -> bool:
    return storage.pattern in LARGE_PATTERNS and not storage.values


@torch.inference_mode()
def measure(group: Group, speeds: peaks.Peaks) -> Iterator[Result]:
    """Lowers, checks and times everything in the group."""
    x = torch.randn(group.rows, group.weight.shape[1]).to(group.weight.dtype)
    rivals = dense_cpu.rivals(group.value_type, group.weight, x, group.inductor, group.chains)
    packed: dict[str, Packed] = {}
    reasons: dict[str, str] = {}
    for stored in group.stored:
        found, reason = stored.fastest(x, TARGET_KERNELS)
        if found:
            packed[str(stored.storage)] = found
        reasons[str(stored.storage)] = reason
    sides = [each.side(name, x) for name, each in packed.items()]
    times = turns.in_turns([*rivals, *sides, *_csr(group, x)], group.seconds)
    dense = {side.name: times[side.name] for side in rivals}
    for stored in group.stored:
        name = str(stored.storage)
        line = _line(group, stored, dense, times.get(CSR.format(stored.storage.pattern)))
        if name in packed:
            rest = (times[name], dense[line.dense], x, speeds)
            yield _timed(line, group, packed[name], *rest)
        else:
            yield replace(line, reason=reasons[name])


CSR = "torch.sparse CSR {}"


def _csr(group: Group, x: Tensor) -> list[turns.Side]:
    """MKL's, of the same weights, where they are sparse enough for it not to be hopeless."""
    if group.value_type != "fp32":
        return []
    bitmaps = [each for each in group.stored if each.storage.density <= 0.2]
    return [
        dense_cpu.csr(CSR.format(each.storage.pattern), each.dense, x)
        for each in bitmaps
        if each.storage.packing.layout == "bitmap"
    ]


def _line(
    group: Group, stored: Stored, dense: dict[str, list[float]], csr: list[float] | None
) -> Result:
    medians = {name: round(turns.median(times), 2) for name, times in dense.items()}
    return Result(
        shape="x".join(map(str, group.weight.shape)),
        value_type=group.value_type,
        values=stored.storage.values,
        pattern=stored.storage.pattern,
        rows=group.rows,
        dense=turns.fastest(dense),
        dense_us=medians,
        csr_us=csr and round(turns.median(csr), 2),
    )


def _timed(
    line: Result,
    group: Group,
    packed: Packed,
    times: list[float],
    dense: list[float],
    x: Tensor,
    speeds: peaks.Peaks,
) -> Result:
    least, bound = speeds.seconds(packed.cost(), line.value_type, packed.spec.density)
    checks_guard = group.quick or (line.pattern in GUARDED and not line.values)
    return replace(
        line,
        sparse_us=round(turns.median(times), 2),
        ratio=round(turns.ratio(dense, times), 3),
        kernel=packed.kernel,
        error=packed.error(x[:CHECKED]),
        roofline_us=round(least * 1e6, 2),
        fraction=round(least * 1e6 / turns.median(times), 3),
        bound=bound,
        in_cache_us=_in_cache(packed, x) if group.quick else None,
        guard=_guard(packed) if checks_guard else "",
    )


def _in_cache(packed: Packed, x: Tensor) -> float | None:
    """Microseconds of the kernel on part of the weight, which stays in the cache, times SHARE."""
    stored = packed.stored
    part = stored.dense[: stored.dense.shape[0] // SHARE]
    small = Stored.of(stored.storage, part).fastest(x, TARGET_KERNELS)[0]
    if small is None:
        return None
    side = turns.Side("in cache", [partial(small.lowering.run, x)])
    return round(SHARE * turns.median(turns.in_turns([side], 0.05)["in cache"]), 2)


def _guard(packed: Packed) -> str:
    """What the product would run by its own measurement, which nothing here has answered before."""
    with tempfile.TemporaryDirectory() as folder:
        weight = packed.stored.dense
        verdict = guard.measure(
            packed.spec, weight, None, packed.lowering, device=CPU, cache=Path(folder)
        )
    return "sparse" if verdict.wins else "dense"


if __name__ == "__main__":
    main()
