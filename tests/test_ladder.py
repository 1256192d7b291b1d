"""The choice by rows: no number of rows may run slower than dense, whatever kernels are like."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from sparsefx import choice, ladder
from sparsefx.errors import KernelRunFailed
from sparsefx.guard import MARGIN, Verdict
from sparsefx.target import LinearSpec, Lowering
from tests.guard_kernels import SPEC

OP = torch.ops.sparsefx_test_guard.linear.default
SIZES = range(1, ladder.MOST + 1)
VARYING = replace(SPEC, rows=16, rows_vary=True)
Time = Callable[[int], float]


@dataclass(frozen=True, eq=False)
class Timed:
    """A kernel that takes `time(rows)` microseconds, for up to `most` rows or multiples only."""

    name: str
    time: Time
    most: int = 10**9
    multiple: int = 1
    layout: str = "nm"

    def accepts(self, spec: LinearSpec) -> str | None:
        return "too many rows" if spec.rows > self.most else None

    def tunings(self, spec: LinearSpec) -> "tuple[Timed, ...]":
        return (self,)

    def lower(self, spec: LinearSpec, packed: tuple[Tensor, ...]) -> Lowering:
        return Lowering(OP, packed, self.name, spec.out_features, "", "", self.multiple)

    def offer(self) -> choice.Offer:
        return choice.Offer(self, self.lower(VARYING, ()))


def tiles(rows: int, tile: int) -> int:
    """Rows that a kernel with tiles works on."""
    return math.ceil(rows / tile) * tile


def dense(rows: int) -> float:
    """20 us for the weight until 32 rows, from where on the work decides."""
    return max(20.0, 20.0 * rows / 32)


KERNELS: dict[str, Time] = {
    "few": lambda rows: 10.0 + rows,
    "tiles of 16": lambda rows: 0.9 * dense(tiles(rows, 16)),
    "tiles of 64": lambda rows: 0.9 * dense(tiles(rows, 64)),
    "many": lambda rows: 300.0 + 0.5 * dense(rows),
    "always": lambda rows: 0.5 * dense(rows),
    "never": lambda rows: 1.01 * dense(rows),
}


def made(
    *kernels: Timed, dispatch_us: float = 0.0, asked: list[int] | None = None, dense: Time = dense
) -> tuple[ladder.Table, str]:
    """The table of some kernels against `dense`, and the reasons."""
    times = {kernel.name: kernel.time for kernel in kernels}

    def ask(spec: LinearSpec, lowering: Lowering) -> Verdict:
        assert not spec.rows_vary
        if asked is not None:
            asked.append(spec.rows)
        took = times[lowering.handle](spec.rows)
        if math.isnan(took):
            raise KernelRunFailed(kernel=lowering.handle, rule="out of range")
        return Verdict(dense(spec.rows), took, "modelled", fault="wrong" if took < 0 else "")

    reasons = choice.Reasons()
    offers = [kernel.offer() for kernel in kernels]
    rungs = ladder.rungs(1, ladder.MOST, VARYING.rows)
    table = ladder.table(offers, VARYING, rungs, ask, reasons, dispatch_us)
    return table, str(reasons)


def runs(table: ladder.Table, rows: int) -> Timed | None:
    """What the operator would run, None for dense."""
    part = [each for each in table.ranges if each.first <= rows][-1] if table.ranges else None
    offers = part.offers if part else ()
    fitting = (each.kernel for each in offers if rows % each.lowering.multiple == 0)
    kernel = next(fitting, None)
    assert kernel is None or isinstance(kernel, Timed)
    return kernel


def took(table: ladder.Table, rows: int, dispatch_us: float = 0.0) -> float:
    kernel = runs(table, rows)
    each = dense(rows) if kernel is None else kernel.time(rows)
    return each + (dispatch_us if table.ranges else 0.0)


SETS = [("few",), ("tiles of 16",), ("tiles of 64",), ("many",), ("few", "many"), tuple(KERNELS)]


@pytest.mark.parametrize("names", SETS, ids="+".join)
@pytest.mark.parametrize("dispatch_us", [0.0, 0.5])
def test_no_number_of_rows_is_slower_than_dense(names: tuple[str, ...], dispatch_us: float) -> None:
    table, _ = made(*(Timed(name, KERNELS[name]) for name in names), dispatch_us=dispatch_us)
    worst = min(dense(rows) / took(table, rows, dispatch_us) for rows in SIZES)
    assert worst >= MARGIN


def test_each_range_has_its_fastest() -> None:
    table, _ = made(*(Timed(name, KERNELS[name]) for name in ("few", "many", "never")))
    chosen = {rows: kernel.name for rows in SIZES if (kernel := runs(table, rows))}
    assert chosen[1] == chosen[8] == "few"
    assert 64 not in chosen
    assert chosen[4096] == chosen[8192] == "many"
    assert table.text() == "few 1..8, dense 9..1023, many 1024.."


def test_a_kernel_that_always_wins_needs_no_table() -> None:
    table, _ = made(Timed("always", KERNELS["always"]), Timed("never", KERNELS["never"]))
    assert table.only is not None and table.only.kernel.name == "always"


def test_dense_everywhere_says_why() -> None:
    table, said = made(Timed("never", KERNELS["never"]))
    assert table.ranges == () and table.verdict is not None
    assert said == "never: the sparse kernel is not faster than dense (modelled)"


def test_a_lost_kernel_is_not_tried_at_every_rung() -> None:
    asked: list[int] = []
    made(Timed("never", KERNELS["never"]), asked=asked)
    assert asked == [1, 2, 4, 8, 16, 32, 64]  # until dense grows with the rows
    asked.clear()
    made(Timed("many", KERNELS["many"]), asked=asked)
    assert max(asked) == ladder.MOST  # it loses by less at each rung


def test_choosing_must_be_paid_for_by_dense_rows_too() -> None:
    """At 9 rows dense takes 20 us, of which a choice of 1 us is more than 3 %."""
    table, said = made(Timed("few", KERNELS["few"]), dispatch_us=1.0)
    assert table.ranges == ()
    assert said == "few: choosing by rows would cost more than it gains"


def test_rows_that_a_kernel_does_not_take_go_elsewhere() -> None:
    always = KERNELS["always"]
    table, _ = made(Timed("eights", always, multiple=8), Timed("sixty-four", always, most=64))
    for rows in SIZES:
        kernel = runs(table, rows)
        assert kernel is None or (rows <= kernel.most and rows % kernel.multiple == 0), rows
    assert {rows for rows in SIZES if runs(table, rows) is None} == {
        rows for rows in range(65, 8193) if rows % 8
    }


def test_misfits_run_the_next_kernel() -> None:
    fast = Timed("eights", lambda rows: 0.2 * dense(rows), multiple=8)
    table, _ = made(fast, Timed("always", KERNELS["always"]))
    names = [kernel.name for rows in (7, 8, 9, 1000, 1001) if (kernel := runs(table, rows))]
    assert names == ["always", "eights", "always", "eights", "always"]
    assert all(each.is_total for each in table.ranges)


def test_a_kernel_that_is_wrong_or_broken_once_runs_nowhere() -> None:
    broken = Timed("broken", lambda rows: math.nan if rows == 8 else 1.0)
    wrong = Timed("wrong", lambda rows: -1.0 if rows == 4 else 1.0)
    table, said = made(broken, wrong)
    assert table.ranges == ()
    assert "broken: " in said and "wrong: wrong" in said


@pytest.mark.parametrize(
    ("least", "most", "example", "expected"),
    [
        (1, 8, 3, (1, 2, 3, 4, 8)),
        (2, 48, 48, (2, 4, 8, 16, 32, 48)),
        (1, 10**9, 9000, tuple(2**power for power in range(14))),
        (5, 5, 5, (5,)),
    ],
)
def test_rungs(least: int, most: int, example: int, expected: tuple[int, ...]) -> None:
    assert ladder.rungs(least, most, example) == expected
