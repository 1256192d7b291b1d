"""Of all kernels and all their tunings the fastest that is right and beats dense."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from sparsefx import choice
from sparsefx.errors import KernelBuildFailed, KernelRunFailed
from sparsefx.guard import Verdict
from sparsefx.target import LinearSpec, Lowering
from tests.guard_kernels import SPEC

OP = torch.ops.sparsefx_test_guard.linear.default


@dataclass(frozen=True)
class Tuned:
    """A kernel with a setting; what runs is named after both."""

    name: str
    tile: int = 0
    tiles: tuple[int, ...] = (0,)
    fails: bool = False
    layout: str = "nm"

    def accepts(self, spec: LinearSpec) -> str | None:
        return None

    def tunings(self, spec: LinearSpec) -> "tuple[Tuned, ...]":
        return tuple(Tuned(self.name, tile, self.tiles, self.fails) for tile in self.tiles)

    def lower(self, spec: LinearSpec, packed: tuple[Tensor, ...]) -> Lowering:
        if self.fails:
            raise KernelBuildFailed(kernel=self.name, rule="no compiler")
        return Lowering(OP, packed, f"{self.name}{self.tile}", spec.out_features, "", "")


def asker(times: dict[str, float], **facts: str) -> choice.Ask:
    """A guard for which dense takes 10 us; a handle among the facts has that fault."""

    def ask(spec: LinearSpec, lowering: Lowering) -> Verdict:
        took = times[lowering.handle]
        if took < 0:
            raise KernelRunFailed(kernel=lowering.handle, rule="out of range")
        return Verdict(10.0, took, "modelled", fault=facts.get(lowering.handle, ""))

    return ask


def chosen(
    kernels: list[Tuned], ask: choice.Ask, proof: bool = True
) -> tuple[str, choice.Choice, str]:
    reasons = choice.Reasons()
    offers = choice.built(choice.proposed(kernels, [SPEC]), (torch.ones(1),), reasons)
    found = choice.fastest(offers, SPEC, ask, proof, reasons)
    return "" if found.offer is None else found.offer.lowering.handle, found, str(reasons)


def test_the_fastest_wins_wherever_it_stands() -> None:
    kernels = [Tuned("a", tiles=(1, 2)), Tuned("b", tiles=(1, 2))]
    for best in ("a1", "a2", "b1", "b2"):
        times = {"a1": 5.0, "a2": 5.0, "b1": 5.0, "b2": 5.0, best: 4.0}
        handle, found, _ = chosen(kernels, asker(times))
        assert handle == best
        assert found.verdict == Verdict(10.0, 4.0, "modelled")


def test_a_fast_kernel_that_is_wrong_or_breaks_is_passed_over() -> None:
    kernels = [Tuned("wrong"), Tuned("broken"), Tuned("unbuilt", fails=True), Tuned("right")]
    times = {"wrong0": 1.0, "broken0": -1.0, "right0": 9.0}
    handle, _, said = chosen(kernels, asker(times, wrong0="wrong numbers"))
    assert handle == "right0"
    assert "wrong: wrong numbers" in said and "broken0 failed" in said and "no compiler" in said


def test_dense_if_none_beats_it_with_a_reason_for_each_kernel() -> None:
    kernels = [Tuned("a", tiles=(1, 2)), Tuned("b")]
    handle, found, said = chosen(kernels, asker({"a1": 20.0, "a2": 12.0, "b0": 11.0}))
    assert (handle, found.offer) == ("", None)
    assert found.verdict is not None and found.verdict.sparse_us == 11.0
    slower = "the sparse kernel is not faster than dense (modelled)"
    assert sorted(said.split("; ")) == [f"a: {slower}", f"b: {slower}"]


def test_without_proof_the_fastest_is_taken_though_it_loses() -> None:
    handle, _, _ = chosen([Tuned("a"), Tuned("b")], asker({"a0": 20.0, "b0": 12.0}), proof=False)
    assert handle == "b0"


def test_best_guesses_come_first_and_eight_are_tried() -> None:
    kernels = [Tuned("a", tiles=tuple(range(9))), Tuned("b", tiles=tuple(range(9)))]
    offers = choice.built(choice.proposed(kernels, [SPEC]), (), choice.Reasons())
    handles = [offer.lowering.handle for offer in offers]
    assert handles == [f"{name}{tile}" for tile in range(4) for name in "ab"]


def test_a_setting_that_makes_the_same_kernel_is_built_once() -> None:
    reasons = choice.Reasons()
    specs = [replace(SPEC, rows=rows) for rows in (1, 64)]
    offers = choice.built(choice.proposed([Tuned("a")], specs), (), reasons)
    assert [offer.lowering.handle for offer in offers] == ["a0"]


@pytest.mark.parametrize("order", [list, reversed])
def test_the_reason_of_a_kernel_is_that_of_its_closest_try(order: Callable[..., object]) -> None:
    reasons = choice.Reasons()
    tries = [("slow", 3.0), ("noise", 1.0), ("did not compile", float("inf"))]
    for reason, ratio in order(tries):  # type: ignore[attr-defined]
        reasons.add(Tuned("a"), reason, ratio)
    assert str(reasons) == "a: noise"


def test_kernels_are_built_side_by_side() -> None:
    """Each waits for the other: one after the other, both would time out."""
    together = threading.Barrier(2, timeout=20)

    class Waiting(Tuned):
        def tunings(self, spec: LinearSpec) -> tuple[Tuned, ...]:
            return (self,)

        def lower(self, spec: LinearSpec, packed: tuple[Tensor, ...]) -> Lowering:
            together.wait()
            return super().lower(spec, packed)

    ways = choice.proposed([Waiting("a"), Waiting("b")], [SPEC])
    handles = [each.lowering.handle for each in choice.built(ways, (), choice.Reasons())]
    assert handles == ["a0", "b0"]


@pytest.mark.parametrize(
    ("refused", "left"),
    [
        ({("a0", 1), ("a0", 64)}, ["b0"]),
        ({("a0", 64)}, ["a0", "b0"]),
        ({("a0", 1), ("a0", 64), ("b0", 1), ("b0", 64)}, []),
    ],
)
def test_what_is_refused_at_all_rows_is_not_timed(
    refused: set[tuple[str, int]], left: list[str]
) -> None:
    def inspect(asked: Sequence[tuple[LinearSpec, Lowering]]) -> list[str]:
        return ["it spills" * ((at.handle, spec.rows) in refused) for spec, at in asked]

    reasons = choice.Reasons()
    specs = [replace(SPEC, rows=rows) for rows in (1, 64)]
    ways = choice.proposed([Tuned("a"), Tuned("b")], specs)
    offers = list(choice.built(ways, (), reasons))
    kept = choice.worth_timing(offers, specs, inspect, reasons)
    assert [offer.lowering.handle for offer in kept] == left
    gone = {"a0", "b0"} - set(left)
    assert str(reasons) == "; ".join(f"{handle[0]}: it spills" for handle in sorted(gone))
