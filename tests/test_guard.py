"""The guard's verdicts: wrong kernels are refused at any speed, slow and unsure ones lose."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefx import guard, timing
from sparsefx.errors import KernelBuildFailed, KernelRunFailed
from tests.guard_kernels import BODIES, FUSED, SEED, SPEC, layer, measure


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.01)


def test_a_slow_kernel_loses_with_a_reason(tmp_path: Path) -> None:
    verdict = measure("slow", tmp_path)
    assert not verdict.wins
    assert verdict.how == "measured"
    assert verdict.ratio > 3
    assert verdict.error == 0
    assert "not faster" in verdict.reason


def test_a_fast_kernel_wins(tmp_path: Path) -> None:
    size = 1024
    spec = replace(SPEC, out_features=size, in_features=size, rows=32, has_bias=False)
    row = torch.randn(1, size, generator=torch.Generator().manual_seed(SEED))
    verdict = measure("rank_one", tmp_path, spec, weight=row.expand(size, size).contiguous())
    assert verdict.wins
    assert verdict.reason == ""
    assert verdict.ratio < 0.7
    assert verdict.error is not None and verdict.error < 1e-5


@pytest.mark.parametrize(
    ("handle", "fault"),
    [("wrong", "wrong numbers"), ("nan", "NaN"), ("narrow", "shape"), ("half", "dtype")],
)
def test_a_wrong_kernel_is_refused_at_any_speed(tmp_path: Path, handle: str, fault: str) -> None:
    verdict = measure(handle, tmp_path)
    assert fault in verdict.fault
    assert not verdict.wins
    assert verdict.reason == verdict.fault
    assert not replace(verdict, sparse_us=verdict.dense_us / 100).wins


def test_a_kernel_that_raises_is_one_typed_error(tmp_path: Path) -> None:
    with pytest.raises(KernelRunFailed, match=r"broken.*IndexError: tile 3") as caught:
        measure("broken", tmp_path)
    assert isinstance(caught.value, KernelBuildFailed), "one except clause catches both"
    assert not (tmp_path / "timings").exists(), "a failure may be of the moment: not remembered"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_epilogue_is_part_of_the_check(tmp_path: Path, dtype: torch.dtype) -> None:
    spec = replace(SPEC, epilogue=FUSED, dtype=dtype)
    verdict = measure("fused", tmp_path, spec)
    assert not verdict.fault
    assert verdict.error == 0
    assert "wrong numbers" in measure("right", tmp_path, spec).fault, "it leaves the epilogue out"


def test_a_large_input_is_timed_on_fewer_rows(tmp_path: Path) -> None:
    seen: set[int] = set()

    def record(x: Tensor, weight: Tensor, bias: Tensor | None, extras: list[Tensor]) -> Tensor:
        seen.add(x.shape[0])
        return F.linear(x, weight, bias)

    BODIES["record"] = record
    size = 1024
    many = 10**6
    spec = replace(SPEC, out_features=size, in_features=size, rows=many, rows_vary=True)
    verdict = measure("record", tmp_path, spec)
    (rows,) = seen
    assert 2 * rows * size * size <= guard.FLOPS_LIMIT["cpu"]
    assert verdict.dense_us > 1e4 * many / 10**6, "scaled up to the rows asked for"


def test_an_unsure_gain_does_not_win() -> None:
    verdict = guard.Verdict(100.0, 50.0, "measured", 0.0, bound=1.1)
    assert not verdict.wins
    assert "noise" in verdict.reason
    assert replace(verdict, bound=0.6).wins


def test_the_global_random_state_is_the_users(tmp_path: Path) -> None:
    torch.manual_seed(SEED)
    before = torch.get_rng_state()
    measure("right", tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_with_gradients_are_measured_without(tmp_path: Path) -> None:
    weight, _ = layer()
    measure("right", tmp_path, weight=weight.requires_grad_())
    assert weight.grad is None and weight.is_leaf


def test_measuring_inside_a_compiler_backend(tmp_path: Path) -> None:
    verdicts: list[guard.Verdict] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        verdicts.append(measure("right", tmp_path))
        return gm.forward

    torch._dynamo.reset()
    model = torch.compile(torch.nn.Linear(3, 3), backend=backend)
    model(torch.ones(2, 3))
    assert verdicts[0].dense_us > 0
    assert verdicts[0].error == 0


def test_the_model_favours_sparse_at_few_rows_only() -> None:
    spec = replace(SPEC, out_features=4096, in_features=4096, dtype=torch.float16, rows=1)
    few = guard.model(spec, "H100")
    assert few.how == "modelled" and few.error is None
    assert few.wins
    many = guard.model(replace(spec, rows=8192), "H100")
    assert not many.wins
    assert "modelled" in many.reason


def test_the_model_knows_the_bitmap() -> None:
    spec = replace(SPEC, layout="bitmap", n=0, m=0, out_features=4096, in_features=4096)
    times = [guard.model(replace(spec, density=d), "A100").sparse_us for d in (0.1, 0.5, 0.9)]
    assert times == sorted(set(times))


def test_noise_is_not_a_win() -> None:
    assert not guard.Verdict(100.0, 99.0, "measured", 0.0).wins
    assert guard.Verdict(100.0, 90.0, "measured", 0.0).wins
