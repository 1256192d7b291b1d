"""Packed linears of the CUDA target against the best dense bf16 one, at the shapes of Llama-3-8B.

    python benchmarks/linear.py                  on a CUDA machine: errors, then times
    python benchmarks/linear.py                  without one: what an H200 could do by its datasheet
                                                 (how = "roofline"), and what the compiler says of
                                                 each kernel ahead of time
    python benchmarks/linear.py --cpu            anywhere: numbers only, in Triton's interpreter

Dense and sparse run in turns, as CUDA graphs over copies of the weight that together exceed the L2
cache twice, so that every weight comes from memory, as it does inside a model. ratio: dense /
sparse, medians over rounds. fraction: of the least time by the datasheet's speeds.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

if "--cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks`, when run as a script

from benchmarks import ahead_of_time, record, turns
from benchmarks.packed import TOLERANCE, Packed, Storage, Stored
from sparsefx import devices
from sparsefx.api.target_table import targets
from sparsefx.cost import linear_cost

SEED = 7
ABSENT = "H200"  # the GPU that is planned for where there is none
ARCH = "sm_90"
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (6144, 4096))
SMALL_SHAPES = ((192, 256), (128, 384))
SMALL_ROWS = (1, 20)
INT4 = ("int4", 128)
CHECKED = 64  # rows of x whose numbers are compared
SECONDS = 1.0  # of one group of sides


@dataclass(frozen=True)
class Goal:
    """What is to be reached with one storage of the weight, as ratios to the best dense bf16."""

    storage: Storage
    rows: tuple[int, ...]
    reach: float
    aim: float


FEW = (1, 8, 16)
GOALS = (
    Goal(Storage("2:4"), FEW, 1.45, 1.65),
    Goal(Storage("2:4"), (64,), 1.25, 1.5),
    Goal(Storage("2:4"), (4096,), 1.0, 1.4),
    Goal(Storage("1:4"), FEW, 2.4, 3.0),
    Goal(Storage("bitmap 70 %"), FEW, 1.7, 2.3),
    Goal(Storage("bitmap 80 %"), FEW, 2.2, 3.0),
    Goal(Storage("bitmap 90 %"), FEW, 3.2, 4.5),
    Goal(Storage("block 64x64 80 %"), (4096,), 3.0, 4.2),
    Goal(Storage("2:4", *INT4), (1,), 3.0, 4.2),
)


@dataclass(frozen=True)
class Result:
    """A line of the table; times in microseconds. how: "measured", "roofline" or "interpreted".

    bound: the ratio that bytes alone allow, without launches. resources: registers a thread,
    spilled bytes and so on, by the compiler for ARCH.
    """

    shape: str
    storage: str
    rows: int
    reach: float
    aim: float
    how: str
    kernel: str = ""
    error: float | None = None
    dense: str = ""
    dense_us: dict[str, float] = field(default_factory=dict)
    sparse_us: float | None = None
    ratio: float | None = None
    fraction: float | None = None
    bound: float | None = None
    resources: dict[str, object] = field(default_factory=dict)
    reason: str = ""

    def __str__(self) -> str:
        cells = (
            f"{self.shape} @ {self.rows}",
            self.storage,
            f"{self.error:.1e}" if self.error is not None else "-",
            f"{self.sparse_us:.1f}" if self.sparse_us else "-",
            f"{self.ratio:.2f}" if self.ratio else "-",
            f"{self.reach:.2f}",
            self.how,
        )
        said = ", ".join(f"{key} {value}" for key, value in self.resources.items())
        return (
            "{:>20} {:<18}{:>8}{:>9}{:>7}{:>7} {:<12}".format(*cells)
            + " ".join((self.kernel, said, self.reason)).strip()
        )


HEAD = f"{'out x in @ rows':>20} {'weight':<18}{'error':>8}{'us':>9}{'ratio':>7}{'reach':>7} how"


def main(arguments: list[str] | None = None) -> None:
    """Prints a line for each goal, shape and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cpu", action="store_true", help="numbers only, on the CPU")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a group of sides")
    parser.add_argument("--no-compile", action="store_true", help="without a GPU: roofline alone")
    parser.add_argument("--json", type=Path, help="keep machine, versions and figures here")
    options = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available() and not options.cpu
    torch.manual_seed(SEED)
    print("\n".join(f"{key}: {value}" for key, value in record.machine().items()), f"\n{HEAD}")
    lines = interpreted() if options.cpu else measured(options) if on_gpu else planned(options)
    results = []
    for result in lines:
        print(result, flush=True)
        results.append(asdict(result))
    if options.json:
        said = {"how": "measured on this GPU" if on_gpu else f"not measured: {ABSENT} by its sheet"}
        record.write(options.json, said, results)
    if wrong := [each for each in results if (each["error"] or 0) > TOLERANCE[torch.bfloat16]]:
        raise SystemExit(f"{len(wrong)} kernels compute wrong numbers, such as {wrong[0]}")


def _lines(shapes: tuple[tuple[int, int], ...], how: str) -> Iterator[tuple[Goal, Result]]:
    for goal in GOALS:
        for out, width in shapes:
            for rows in goal.rows:
                numbers = (rows, goal.reach, goal.aim, how)
                yield goal, Result(f"{out}x{width}", str(goal.storage), *numbers)


def planned(options: argparse.Namespace) -> Iterator[Result]:
    """The roofline of the absent GPU, and the resources of the kernel that it would run first."""
    device = devices.named(ABSENT)
    facts = {} if options.no_compile else _resources()
    for goal, line in _lines(SHAPES, "roofline"):
        out, width = map(int, line.shape.split("x"))
        costs = (
            linear_cost("dense", out, width, line.rows, 0, 0, 1.0, torch.bfloat16),
            goal.storage.cost(out, width, line.rows, torch.bfloat16),
        )
        dense, sparse = (cost.seconds(device) for cost in costs)
        bare_dense, bare_sparse = (cost.seconds(replace(device, launch_ns=0)) for cost in costs)
        kernel, reason, found = facts.get((line.storage, line.rows), ("", "", {}))
        yield replace(
            line,
            kernel=kernel,
            dense="bf16 roofline",
            dense_us={"bf16 roofline": round(dense * 1e6, 2)},
            sparse_us=round(sparse * 1e6, 2),
            ratio=round(dense / sparse, 3),
            bound=round(bare_dense / bare_sparse, 3),
            resources=found,
            reason=reason,
        )


Facts = tuple[str, str, dict[str, object]]


def _resources() -> dict[tuple[str, int], Facts]:
    """(storage, rows) -> kernel, why there is none, resources; at the first shape, for ARCH."""
    asked, found = [], {}
    weight = torch.randn(SHAPES[0], dtype=torch.bfloat16)
    for goal in GOALS:
        stored = Stored.of(goal.storage, weight)
        for rows in goal.rows:
            packed, reason = stored.first(rows, targets()["cuda"].kernels)
            found[str(goal.storage), rows] = ("", reason, {})
            if packed:
                found[str(goal.storage), rows] = (packed.kernel, "", {})
                asked.append((str(goal.storage), rows, packed.lowering.handle))
    handles, rows_asked = [handle for *_, handle in asked], [rows for _, rows, _ in asked]
    answers = ahead_of_time.resources(handles, ARCH, rows_asked, *SHAPES[0])
    for (storage, rows, _), answer in zip(asked, answers, strict=True):
        kernel = found[storage, rows][0]
        found[storage, rows] = (kernel, str(answer.pop("error", "")), answer)
    return found


@torch.inference_mode()
def interpreted() -> Iterator[Result]:
    """Numbers alone, at small shapes. float16: Triton's interpreter does not compute bfloat16."""
    for goal, line in _lines(SMALL_SHAPES, "interpreted"):
        if line.rows == goal.rows[0]:
            for rows in SMALL_ROWS:
                x, stored = _inputs(line.shape, rows, goal.storage, torch.device("cpu"))
                found, reason = stored.first(rows, targets()["cuda"].kernels)
                yield _checked(replace(line, rows=rows), found, reason, x)


@torch.inference_mode()
def measured(options: argparse.Namespace) -> Iterator[Result]:
    """On the GPU at hand: each goal in turns with all dense ones."""
    from benchmarks import dense_gpu  # only with a GPU

    device = devices.named(devices.nearest("cuda"))
    for goal, line in _lines(SHAPES, "measured"):
        x, stored = _inputs(line.shape, line.rows, goal.storage, torch.device("cuda"))
        found, reason = stored.fastest(x, targets()["cuda"].kernels, turns.cuda)
        line = _checked(line, found, reason, x)
        if found is None:
            yield line
            continue
        pruned = stored.dense if goal.storage == Storage("2:4") else None
        rivals = dense_gpu.rivals(x, torch.randn_like(stored.dense), pruned)
        sparse = dense_gpu.side("sparse", partial(found.run, x), found.lowering.packed)
        times = turns.in_turns([*rivals, sparse], options.seconds, turns.cuda)
        ours = times.pop("sparse")
        best = turns.fastest({name: each for name, each in times.items() if "bf16" in name})
        yield replace(
            line,
            dense=best,
            dense_us={name: round(turns.median(each), 2) for name, each in times.items()},
            sparse_us=round(turns.median(ours), 2),
            ratio=round(turns.ratio(times[best], ours), 3),
            fraction=round(found.cost().seconds(device) * 1e6 / turns.median(ours), 3),
        )


def _inputs(shape: str, rows: int, storage: Storage, device: torch.device) -> tuple[Tensor, Stored]:
    out, width = map(int, shape.split("x"))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16
    x = torch.randn(rows, width, device=device, dtype=dtype)
    return x, Stored.of(storage, torch.randn(out, width, device=device, dtype=dtype))


def _checked(line: Result, found: Packed | None, reason: str, x: Tensor) -> Result:
    if found is None:
        return replace(line, reason=reason)
    return replace(line, kernel=found.kernel, error=found.error(x[:CHECKED]))


if __name__ == "__main__":
    main()
