"""Sparse attention as a user asks for it: compile, sparsify, save, load, export, explain."""

import copy
from pathlib import Path

import onnxruntime
import pytest
import torch
import transformers as hf
from torch import Tensor

import sparsefx
from sparsefx.annotations import attention_thresholds
from sparsefx.attention.thresholds import SkipThresholds
from sparsefx.errors import (
    AttentionNotFound,
    EmptyCalibration,
    HeadsMismatch,
    MissingCalibration,
    ShortCalibration,
)
from sparsefx.spec import Recipe

NAMES = ["model.layers.0.self_attn", "model.layers.1.self_attn"]


@pytest.fixture(scope="module")
def model() -> hf.LlamaForCausalLM:
    """A Llama in which all queries look at tokens below 48, and away from the others.

    The fourth pair of a head's dimensions turns by 0.001 a position only: there q has a constant
    and k the sign that the token's embedding starts with.
    """
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        attention_bias=True,
    )
    llama = hf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        llama.model.embed_tokens.weight[:48, 0] = 4
        llama.model.embed_tokens.weight[48:, 0] = -4
        for number, layer in enumerate(llama.model.layers):
            attention = layer.self_attn
            attention.q_proj.bias[3::8] = torch.tensor([2.0, 3.0, 4.0, 5.0]) - number
            attention.k_proj.weight[3::8] = 0
            attention.k_proj.weight[3::8, 0] = 0.4
            attention.v_proj.weight *= 20
    return llama


def ids(length: int, seed: int, batch: int = 1) -> Tensor:
    """Runs of 16 tokens that are looked at, or (7 of 10) are not; the first run is."""
    generator = torch.Generator().manual_seed(seed)
    away = torch.rand(batch, -(-length // 16), generator=generator) < 0.7
    away[:, 0] = False
    shift = 48 * away.repeat_interleave(16, 1)[:, :length]
    return torch.randint(0, 48, (batch, length), generator=generator) + shift


def batches(length: int = 160) -> list[dict[str, object]]:
    return [{"input_ids": ids(length, seed), "use_cache": False} for seed in range(2)]


def recipe(**goal: object) -> Recipe:
    return Recipe(attention=sparsefx.SkipSoftmax(tile=(16, 16), **goal))  # type: ignore[arg-type]


@torch.no_grad()
def distance(model: torch.nn.Module, other: torch.nn.Module) -> float:
    x = ids(160, 9)
    first, second = (each(input_ids=x, use_cache=False).logits for each in (model, other))
    return float((first - second).norm() / first.norm())


@torch.no_grad()
def test_the_three_lines_of_a_user(model: hf.LlamaForCausalLM) -> None:
    before = copy.deepcopy(model.state_dict())
    fast = sparsefx.compile(model, recipe=recipe(sparsity=0.5), calibration=batches(), guard="off")
    assert 0 < distance(model, fast) < 0.5
    report = sparsefx.explain(fast)
    rows = [row for row in report.rows if row.op == "attention"]
    assert [row.name for row in rows] == NAMES and not report.check()
    assert {row.kernel for row in rows} == {"cpp_skip_softmax_attention"}
    skipped = [row.skipped for row in rows]
    assert sum(skipped) / 2 == pytest.approx(0.5, abs=0.05)  # type: ignore[arg-type]
    assert all(row.lost_mass is not None and row.error is not None for row in rows)
    assert all("decode" in row.thresholds and "160 keys" in row.thresholds for row in rows)
    assert attention_thresholds(model) == {} and set(attention_thresholds(fast)) == set(NAMES)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@torch.no_grad()
def test_writing_token_by_token(model: hf.LlamaForCausalLM) -> None:
    """One graph for the prompt, few for the steps, whatever the length."""
    fast = sparsefx.compile(model, recipe=recipe(sparsity=0.3), calibration=batches(), guard="off")
    out = fast.generate(ids(100, 5), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert out.shape == (1, 108)
    rows = [row for row in sparsefx.explain(fast).rows if row.op == "attention" and row.graph]
    assert rows and all(row.kernel for row in rows)
    assert max(row.graph for row in rows) <= 3
    kept = fast.generate(ids(100, 5), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert torch.equal(out, kept)


def test_under_the_guard_nothing_runs_that_was_not_shown_to_win(
    model: hf.LlamaForCausalLM,
) -> None:
    fast = sparsefx.compile(model, recipe=recipe(sparsity=0.5), calibration=batches())
    apart = distance(model, fast)
    for row in sparsefx.explain(fast).rows:
        if row.op == "attention":
            assert row.kernel or "not faster than dense" in row.reason
            assert row.how == "measured" and row.dense_us and row.sparse_us
            assert not row.kernel or row.sparse_us < row.dense_us
    dense = all(not row.kernel for row in sparsefx.explain(fast).rows)
    assert (apart < 1e-5) == dense


def test_thresholds_travel_with_the_model(model: hf.LlamaForCausalLM, tmp_path: Path) -> None:
    sparse = sparsefx.sparsify(model, recipe(sparsity=0.5), batches(), progress=False)
    assert distance(model, sparse) == 0.0  # eager attention stays dense
    sparsefx.save(sparse, tmp_path / "kept")
    again = sparsefx.load(tmp_path / "kept", copy.deepcopy(model))
    found = attention_thresholds(again)
    assert found == attention_thresholds(sparse) and set(found) == set(NAMES)
    torch._dynamo.reset()
    fast = sparsefx.compile(again, guard="off")
    assert distance(model, fast) > 0
    direct = sparsefx.compile(
        model, recipe=recipe(sparsity=0.5), calibration=batches(), guard="off"
    )
    assert distance(direct, fast) < 1e-6


@torch.no_grad()
def test_the_named_backend_takes_thresholds(model: hf.LlamaForCausalLM) -> None:
    sparse = sparsefx.sparsify(model, recipe(sparsity=0.5), batches(), progress=False)
    torch._dynamo.reset()
    options = {"thresholds": attention_thresholds(sparse), "guard": "off"}
    fast = torch.compile(model, backend="sparsefx", options=options)
    assert distance(model, fast) > 0  # type: ignore[arg-type]
    kernels = [row.kernel for row in sparsefx.explain(fast).rows if row.op == "attention"]
    assert kernels == ["cpp_skip_softmax_attention"] * 2


@pytest.mark.parametrize("form", ["standard", "functions"])
def test_export(model: hf.LlamaForCausalLM, tmp_path: Path, form: str) -> None:
    length = torch.export.Dim("length", min=2, max=512)
    path = tmp_path / "long.onnx"
    report = sparsefx.export_onnx(
        model,
        (),
        path,
        kwargs={"input_ids": ids(100, 3, 2), "use_cache": False},
        dynamic_shapes={"input_ids": {1: length}, "use_cache": None},
        recipe=recipe(sparsity=0.5),
        calibration=batches(),
        form=form,
    )
    assert "of an attention's output" in report.facts["largest change by thresholds on the example"]
    rows = [row for row in report.rows if row.op == "attention"]
    assert len(rows) == 2 and all("gains no time" in row.reason for row in rows)
    torch._dynamo.reset()
    fast = sparsefx.compile(model, recipe=recipe(sparsity=0.5), calibration=batches(), guard="off")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = ids(160, 9, 2)
    (got,) = session.run(None, {"input_ids": x.numpy()})
    with torch.no_grad():
        expected = fast(input_ids=x, use_cache=False).logits
        dense = model(input_ids=x, use_cache=False).logits
    gap = (torch.from_numpy(got) - expected).norm() / expected.norm()
    assert float(gap) < 1e-3 < float((dense - expected).norm() / expected.norm())


def test_theta(model: hf.LlamaForCausalLM) -> None:
    wanted = Recipe(attention=sparsefx.Theta(k=16, dense_layers=0))
    fast = sparsefx.compile(model, recipe=wanted, calibration=batches(), guard="off")
    assert 0 < distance(model, fast) < 0.5
    rows = [row for row in sparsefx.explain(fast).rows if row.op == "attention"]
    assert {row.kernel for row in rows} == {"cpp_theta_attention"}
    assert all(row.pattern == "top-theta k=16" for row in rows)
    assert all(row.skipped is not None and row.skipped > 0.3 for row in rows)


def test_given_factors_need_no_data(model: hf.LlamaForCausalLM) -> None:
    fast = sparsefx.compile(model, recipe=recipe(scale_factor=30.0), guard="off")
    assert distance(model, fast) > 0
    torch._dynamo.reset()
    guarded = sparsefx.compile(model, recipe=recipe(scale_factor=30.0))
    assert distance(model, guarded) < 1e-5
    rows = [row for row in sparsefx.explain(guarded).rows if row.op == "attention"]
    assert all("pass calibration=" in row.reason for row in rows)


def test_globs_leave_layers_dense(model: hf.LlamaForCausalLM) -> None:
    skip = sparsefx.SkipSoftmax(sparsity=0.4, tile=(16, 16))
    wanted = Recipe(attention={"*.0.self_attn": None, "*": skip})
    fast = sparsefx.compile(model, recipe=wanted, calibration=batches(), guard="off")
    distance(model, fast)
    first, second = (row for row in sparsefx.explain(fast).rows if row.op == "attention")
    assert not first.kernel and "the recipe leaves it dense" in first.reason
    assert second.kernel


def test_bad_input_is_named_and_leaves_the_model_alone(model: hf.LlamaForCausalLM) -> None:
    def ask(wanted: Recipe, data: object) -> None:
        sparsefx.compile(model, recipe=wanted, calibration=data)  # type: ignore[arg-type]

    with pytest.raises(MissingCalibration, match="SkipSoftmax.*pass calibration="):
        ask(recipe(sparsity=0.5), None)
    with pytest.raises(EmptyCalibration):
        ask(recipe(sparsity=0.5), [])
    with pytest.raises(EmptyCalibration):
        ask(recipe(sparsity=0.5), iter([]))
    with pytest.raises(ShortCalibration, match="60 keys and a tile has 16"):
        ask(recipe(sparsity=0.5), batches(60))
    with pytest.raises(AttentionNotFound, match="nothing"):
        ask(Recipe(attention={"nothing*": sparsefx.SkipSoftmax(sparsity=0.5)}), batches())
    assert attention_thresholds(model) == {}
    alien = SkipThresholds((1.0,) * 3, (1.0,) * 3, (16, 16), "ascending")
    other = copy.deepcopy(model)
    sparsefx.annotations.annotate_attention(other, dict.fromkeys(NAMES, alien))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="are for 3 heads and it has 4") as caught:
        distance(model, sparsefx.compile(other))
    assert HeadsMismatch.__name__ in str(caught.value) or isinstance(caught.value, HeadsMismatch)


def test_batches_may_come_once_only(model: hf.LlamaForCausalLM) -> None:
    listed = sparsefx.sparsify(model, recipe(sparsity=0.5), batches(), progress=False)
    streamed = sparsefx.sparsify(model, recipe(sparsity=0.5), iter(batches()), progress=False)
    assert attention_thresholds(listed) == attention_thresholds(streamed)


def test_a_loss_of_ones_own_limits_the_budget(model: hf.LlamaForCausalLM) -> None:
    def loss(candidate: torch.nn.Module) -> float:
        return 1.0 + distance(model, candidate)

    whole = sparsefx.sparsify(model, recipe(sparsity=0.6), batches(), progress=False)
    bound = recipe(sparsity=0.6, metric=loss, within=1e-3)
    limited = sparsefx.sparsify(model, bound, batches(), progress=False)

    def skipped(found: torch.nn.Module) -> float:
        return sum(each.skipped[0] or 0 for each in attention_thresholds(found).values())  # type: ignore[misc]

    assert skipped(limited) < skipped(whole)
    torch._dynamo.reset()
    assert loss(sparsefx.compile(limited, guard="off")) <= 1.0 + 1.1e-3
