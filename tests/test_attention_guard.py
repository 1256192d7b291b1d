"""The guard of sparse attention: crossover, faults, cache; and the inputs that it measures on."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsefx.attention import guard, meaning
from sparsefx.attention.probe import probe
from sparsefx.errors import KernelRunFailed
from sparsefx.target import AttentionLowering, AttentionSpec
from tests.plain_attention import CALLS, PlainSkip

CPU = torch.device("cpu")
SPEC = AttentionSpec(
    method="skip_softmax",
    phase="prefill",
    heads=4,
    kv_heads=2,
    head_dim=16,
    dtype=torch.float32,
    mask="none",
    is_causal=True,
    window=0,
    tile=(32, 16),
    order="sink_diagonal",
    options=(),
    batch=1,
    queries=512,
    keys=512,
    vary=False,
    sparsity=0.7,
)
THETA = replace(SPEC, method="theta", tile=(0, 0), order="", options=("4", "pre", "exact", "True"))


def lowered(how: str) -> AttentionLowering:
    return PlainSkip(how).lower(SPEC)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("order", ["sink_diagonal", "ascending"])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_probes_skip_what_was_asked(phase: str, order: str, mask: str, sparsity: float) -> None:
    spec = replace(SPEC, phase=phase, order=order, mask=mask, is_causal=mask == "none")
    spec = replace(spec, is_causal=spec.is_causal and phase == "prefill")
    case = probe(spec, 1600, sparsity, CPU)
    s = meaning.scores(case.q, case.k, case.mask, *case.seen)
    keep = meaning.kept_tiles(s, 1, case.method[0], 32, 16, order)  # type: ignore[arg-type]
    whole = torch.zeros_like(case.method[0])  # type: ignore[arg-type]
    visible = meaning.kept_tiles(s, 1, whole, 32, 16, order)
    assert 1 - float(keep.sum() / visible.sum()) == pytest.approx(sparsity, abs=0.1)


def test_probes_of_theta_and_block() -> None:
    case = probe(THETA, 400, 0.8, CPU)
    s = meaning.scores(case.q, case.k, None, *case.seen)
    table = case.method[1]
    assert isinstance(table, torch.Tensor)
    seen = s > -torch.inf
    assert float((s > table[0, 0]).sum() / seen.sum()) == pytest.approx(0.2, abs=0.07)
    block = probe(replace(SPEC, method="block", vary=True), 400, 0.8, CPU)
    keep = block.method[0]
    assert isinstance(keep, torch.Tensor) and keep.shape == (1, 2, 13, 25)
    assert float(keep.float().mean()) == pytest.approx(0.2, abs=0.15)
    assert meaning.block_attention(*block.arguments).isfinite().all()  # type: ignore[arg-type]


def test_a_fast_kernel_wins_from_the_first_length_on(tmp_path: Path) -> None:
    spec = replace(SPEC, vary=True)
    found = guard.measure(spec, lowered("fast"), device=CPU, cache=tmp_path)
    assert found.wins and found.from_keys == guard.SHORTEST and found.keys == 2 * guard.SHORTEST
    assert found.how == "measured" and 0 < found.sparse_us < found.dense_us and not found.reason


def test_a_slow_kernel_never_wins_and_says_so(tmp_path: Path) -> None:
    found = guard.measure(SPEC, lowered("slow"), device=CPU, cache=tmp_path)
    assert not found.wins and found.from_keys is None
    assert found.reason == "the sparse attention is not faster than dense up to 512 keys (measured)"


def test_wrong_numbers_are_a_fault(tmp_path: Path) -> None:
    found = guard.measure(SPEC, lowered("wrong"), device=CPU, cache=tmp_path)
    assert not found.wins and found.reason == "the sparse kernel computes wrong numbers"


def test_a_kernel_that_raises_is_named(tmp_path: Path) -> None:
    with pytest.raises(KernelRunFailed, match=r"broken.*IndexError: tile 3 is out of range"):
        guard.measure(SPEC, lowered("broken"), device=CPU, cache=tmp_path)


def test_layers_that_skip_alike_share_one_answer(tmp_path: Path) -> None:
    first = guard.measure(SPEC, lowered("slow"), device=CPU, cache=tmp_path)
    before = CALLS["slow"]
    alike = replace(SPEC, sparsity=0.76, heads=8, kv_heads=4)
    assert guard.measure(alike, lowered("slow"), device=CPU, cache=tmp_path) == first
    assert CALLS["slow"] == before
    guard.measure(replace(SPEC, sparsity=0.81), lowered("slow"), device=CPU, cache=tmp_path)
    assert CALLS["slow"] > before


def test_a_damaged_answer_is_found_again(tmp_path: Path) -> None:
    guard.measure(SPEC, lowered("wrong"), device=CPU, cache=tmp_path)
    (path,) = (tmp_path / "timings").glob("*.json")
    path.write_text(path.read_text().replace('"keys": 0', '"keys": "0"'))
    assert guard.measure(SPEC, lowered("wrong"), device=CPU, cache=tmp_path).fault


@pytest.mark.parametrize(("skipped", "wins"), [(0.0, False), (0.7, True)])
def test_the_roofline_of_a_device_that_is_absent(skipped: float, wins: bool) -> None:
    spec = replace(SPEC, vary=True, head_dim=128, dtype=torch.bfloat16, sparsity=skipped)
    found = guard.model(spec, "h200")
    assert found.wins is wins and found.how == "modelled"
    if wins:
        # QK^T is always computed: at most 2 / (1 + 0.3)
        assert 1 < found.dense_us / found.sparse_us < 2 / 1.3


def test_the_crossover_is_where_a_run_of_wins_begins() -> None:
    def verdict(*bounds: float) -> int | None:
        steps = (guard._Step(512 << i, 1.0, b, b) for i, b in enumerate(bounds))
        return guard._verdict(tuple(steps), "measured", "").from_keys

    assert verdict(1.2, 0.9, 0.8) == 1024
    assert verdict(0.9, 1.2, 0.8) == 2048
    assert verdict(0.9, 1.2) is None
    assert verdict() is None
