"""The guard: wrong kernels are refused, slow ones lose, and no question is timed twice."""

import collections
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefx import diskcache, epilogue, guard, timing
from sparsefx.errors import KernelBuildFailed, KernelRunFailed
from sparsefx.target import LinearSpec, Lowering

SPEC = LinearSpec(
    layout="nm",
    out_features=24,
    in_features=16,
    n=2,
    m=4,
    density=0.5,
    dtype=torch.float32,
    has_bias=True,
    epilogue="",
    rows=6,
    rows_vary=False,
)
SEED = 7
CALLS: collections.Counter[str] = collections.Counter()
BODIES: dict[str, Callable[[Tensor, Tensor, Tensor | None, list[Tensor]], Tensor]] = {}


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, extras: list[Tensor], handle: str
) -> Tensor:
    """The fake kernel: `handle` names its body; every call is counted."""
    CALLS[handle] += 1
    return BODIES[handle](x, weight, bias, extras)


@pytest.fixture(scope="module", autouse=True)
def library() -> Iterator[torch.library.Library]:
    made = torch.library.Library("sparsefx_test_guard", "DEF")
    made.define(
        "linear(Tensor x, Tensor weight, Tensor? bias, Tensor[] extras, str handle) -> Tensor"
    )
    made.impl("linear", linear, "CompositeExplicitAutograd")
    yield made
    made._destroy()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.01)
    CALLS.clear()


def lowering(handle: str, weight: Tensor, text: str = "text") -> Lowering:
    op = torch.ops.sparsefx_test_guard.linear.default
    return Lowering(op, (weight,), handle, text, path="")


def layer(spec: LinearSpec = SPEC) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    weight = torch.randn(spec.out_features, spec.in_features, generator=generator)
    return weight.to(spec.dtype), torch.randn(spec.out_features, generator=generator).to(spec.dtype)


def measure(
    handle: str,
    cache: Path,
    spec: LinearSpec = SPEC,
    weight: Tensor | None = None,
    text: str = "text",
) -> guard.Verdict:
    default, bias = layer(spec)
    weight = default if weight is None else weight
    bias_or_none = bias if spec.has_bias else None
    made = lowering(handle, weight, text)
    return guard.measure(spec, weight, bias_or_none, made, device="cpu", cache=cache)


def right(x: Tensor, weight: Tensor, bias: Tensor | None, extras: list[Tensor]) -> Tensor:
    return F.linear(x, weight, bias)


def slow(x: Tensor, weight: Tensor, bias: Tensor | None, extras: list[Tensor]) -> Tensor:
    time.sleep(0.002)
    return F.linear(x, weight, bias)


def wrong(x: Tensor, weight: Tensor, bias: Tensor | None, extras: list[Tensor]) -> Tensor:
    result = F.linear(x, weight, bias)
    result[-1, -1] += 0.1
    return result


def fused(x: Tensor, weight: Tensor, bias: Tensor | None, extras: list[Tensor]) -> Tensor:
    return epilogue.apply(F.linear(x, weight, bias), FUSED, extras)


def broken(x: Tensor, weight: Tensor, bias: Tensor | None, extras: list[Tensor]) -> Tensor:
    raise IndexError("tile 3 is out of range")


def rank_one(x: Tensor, weight: Tensor, bias: Tensor | None, extras: list[Tensor]) -> Tensor:
    return (x @ weight[0])[:, None].expand(-1, weight.shape[0]).contiguous()


FUSED = "mul 1;silu;add 0;scale 0.5"
BODIES.update(
    right=right,
    slow=slow,
    wrong=wrong,
    fused=fused,
    broken=broken,
    rank_one=rank_one,
    nan=lambda *args: right(*args) * math.nan,
    narrow=lambda *args: right(*args)[:, :-1],
    half=lambda *args: right(*args).half(),
)


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


def test_a_refusal_is_remembered_on_disk(tmp_path: Path) -> None:
    verdict = measure("wrong", tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    CALLS.clear()
    assert measure("wrong", tmp_path / "b") == verdict
    assert not CALLS


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


def test_each_question_is_timed_once(tmp_path: Path) -> None:
    first = measure("right", tmp_path)
    assert CALLS["right"] > 3
    CALLS.clear()
    near = replace(SPEC, density=0.5041)
    assert measure("right", tmp_path, near) is first, "densities that agree to two digits share"
    assert not CALLS


@pytest.mark.parametrize("change", [{"rows": 7}, {"density": 0.52}, {"epilogue": "relu"}])
def test_another_spec_is_another_question(tmp_path: Path, change: dict[str, float | str]) -> None:
    measure("right", tmp_path)
    CALLS.clear()
    measure("right", tmp_path, replace(SPEC, **change))
    assert CALLS["right"] > 3


def test_another_kernel_text_or_thread_count_is_another_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure("right", tmp_path)
    CALLS.clear()
    measure("right", tmp_path, text="other text")
    assert CALLS["right"] > 3
    CALLS.clear()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    measure("right", tmp_path)
    assert CALLS["right"] > 3


def test_another_process_reads_the_file(tmp_path: Path) -> None:
    first = measure("right", tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # a new folder has no memo, as a new process
    CALLS.clear()
    assert measure("right", tmp_path / "b") == first
    assert not CALLS


DAMAGE = {
    "truncated": lambda text: text[: len(text) // 2],
    "empty": lambda text: b"",
    "not json": lambda text: b"\x00\xff" * 50,
    "list": lambda text: b"[1, 2]",
    "deep": lambda text: b"[" * 100_000,
    "nan": lambda text: text.replace(b'"dense_us": ', b'"dense_us": NaN, "x": '),
    "negative": lambda text: text.replace(b'"sparse_us": ', b'"sparse_us": -'),
    "huge": lambda text: text.replace(
        b'"sparse_us": ', b'"sparse_us": 1' + b"0" * 500 + b', "x": '
    ),
    "text for a number": lambda text: text.replace(b'"dense_us": ', b'"dense_us": "1", "x": '),
    "no bound": lambda text: text.replace(b'"bound"', b'"bond"'),
    "no fault": lambda text: text.replace(b'"fault"', b'"fate"'),
    "other key": lambda text: text.replace(b"float32", b"float16"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_measured_again(tmp_path: Path, damage: str) -> None:
    measure("right", tmp_path / "a")
    (entry,) = (tmp_path / "a" / "timings").iterdir()
    copy = tmp_path / "b" / "timings" / entry.name
    copy.parent.mkdir(parents=True)
    whole = entry.read_bytes()
    copy.write_bytes(DAMAGE[damage](whole))
    assert copy.read_bytes() != whole
    CALLS.clear()
    verdict = measure("right", tmp_path / "b")
    assert CALLS["right"] > 3
    assert verdict.dense_us > 0
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    CALLS.clear()
    assert measure("right", tmp_path / "c") == verdict
    assert not CALLS, "the damaged entry was replaced by a good one"


def test_a_cache_that_cannot_be_written_costs_no_answer(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be")
    assert measure("right", blocked).dense_us > 0
    assert blocked.read_text() == "a file where the folder should be"


def test_no_half_written_file_is_left(tmp_path: Path) -> None:
    measure("right", tmp_path)
    assert [path.suffix for path in (tmp_path / "timings").iterdir()] == [".json"]


def test_varying_rows_take_the_worst_size(tmp_path: Path) -> None:
    seen: list[int] = []

    def slow_at_many_rows(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
        seen.append(x.shape[0])
        if x.shape[0] > 32:
            time.sleep(0.01)
        return (x @ weight[0])[:, None].expand(-1, weight.shape[0]).contiguous()

    BODIES["varying"] = slow_at_many_rows
    size = 1024
    spec = replace(SPEC, out_features=size, in_features=size, rows=32, has_bias=False)
    row = torch.randn(1, size, generator=torch.Generator().manual_seed(SEED))
    weight = row.expand(size, size).contiguous()
    assert measure("varying", tmp_path, spec, weight).wins
    assert set(seen) == {32}
    varying = measure("varying", tmp_path, replace(spec, rows_vary=True), weight)
    assert set(seen) == {32, 128}
    assert not varying.wins


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
    # 64 rows are bound by memory, 256 nearly by compute: the worst of both decides
    vary = guard.model(replace(spec, rows=64, rows_vary=True), "H100")
    assert vary == guard.model(replace(spec, rows=256), "H100")


def test_the_model_knows_the_bitmap() -> None:
    spec = replace(SPEC, layout="bitmap", n=0, m=0, out_features=4096, in_features=4096)
    times = [guard.model(replace(spec, density=d), "A100").sparse_us for d in (0.1, 0.5, 0.9)]
    assert times == sorted(set(times))


def test_noise_is_not_a_win() -> None:
    assert not guard.Verdict(100.0, 99.0, "measured", 0.0).wins
    assert guard.Verdict(100.0, 90.0, "measured", 0.0).wins


def test_diskcache_keeps_keys_apart(tmp_path: Path) -> None:
    diskcache.remember(tmp_path, {"a": "1"}, {"value": 1})
    diskcache.remember(tmp_path, {"a": "2"}, {"value": 2})
    assert diskcache.recall(tmp_path, {"a": "1"}) == {"value": 1}
    assert diskcache.recall(tmp_path, {"a": "3"}) is None
