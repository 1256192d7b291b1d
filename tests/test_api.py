"""The public face: what compile, the backend and explain promise, and every bad input."""

import copy
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import sparsefx
from sparsefx import NM, Recipe, Unstructured
from sparsefx import errors as errs
from sparsefx.session import recall
from tests.hf_models import ids, llama

RECIPE = Recipe({"*mlp*": NM(2, 4), "*self_attn*": Unstructured(0.5)})


class Two(nn.Module):
    """Two linears, the first with an activation."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Linear(width, 64)
        self.second = nn.Linear(64, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(self.first(x)))
        return y


def two(seed: int = 0) -> Two:
    torch.manual_seed(seed)
    return sparsefx.sparsify(Two(), Recipe({"*": NM(2, 4)}), progress=False).eval()


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


@torch.no_grad()
def test_compiled_language_model_keeps_its_face() -> None:
    torch.manual_seed(0)
    case = llama()
    model = sparsefx.sparsify(case.model, RECIPE, progress=False)
    assert isinstance(model, PreTrainedModel)
    fast = sparsefx.compile(model, guard="off")
    assert type(fast) is type(model)
    assert fast.config is model.config
    assert list(fast.state_dict()) == list(model.state_dict())
    settings = {"max_new_tokens": 6, "do_sample": False}
    prompt = ids(2, 7)
    expected = model.generate(prompt, **settings)
    assert torch.equal(fast.generate(prompt, **settings), expected)
    kernels = {row.kernel for row in sparsefx.explain(fast).rows}
    assert {"cpp_nm_linear", "cpp_bitmap_linear"} <= kernels


@torch.no_grad()
def test_compile_with_recipe_leaves_the_users_model_alone() -> None:
    torch.manual_seed(0)
    model = Two().eval()
    before = copy.deepcopy(model.state_dict())
    fast = sparsefx.compile(model, recipe=Recipe({"first.*": NM(2, 4)}), guard="off")
    x = torch.randn(4, 32)
    expected = sparsefx.sparsify(model, Recipe({"first.*": NM(2, 4)}), progress=False)(x)
    torch.testing.assert_close(fast(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model._compiled_call_impl is None


@torch.no_grad()
def test_a_dense_model_compiles_to_itself_and_says_so() -> None:
    torch.manual_seed(0)
    model = Two().eval()
    fast = sparsefx.compile(model)
    x = torch.randn(4, 32)
    torch.testing.assert_close(fast(x), model(x))
    reasons = [row.reason for row in sparsefx.explain(fast).rows]
    assert len(reasons) == 2
    assert all("of the weights are zero" in reason for reason in reasons)


@torch.no_grad()
def test_measured_guard_gives_every_row_two_times_or_a_reason() -> None:
    fast = sparsefx.compile(two(), guard="measure")
    fast(torch.randn(4, 32))
    report = sparsefx.explain(fast)
    assert report.check() == []
    for row in report.rows:
        assert row.how == "measured"
        assert row.dense_us and row.sparse_us
        assert bool(row.kernel) != bool(row.reason)


@torch.no_grad()
def test_planning_for_an_absent_gpu_runs_right_and_is_modelled() -> None:
    model = two()
    fast = sparsefx.compile(model, target="h100", guard="model")
    x = torch.randn(4, 32)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    rows = sparsefx.explain(fast).rows
    assert {row.how for row in rows} == {"modelled"}
    assert all(row.kernel.startswith("triton_") or row.reason for row in rows)


def test_explain_before_the_first_call_lists_the_layers() -> None:
    report = sparsefx.explain(sparsefx.compile(two()))
    assert [row.name for row in report.rows] == ["first", "second"]
    assert all("first call" in row.reason for row in report.rows)


def test_the_backend_is_registered() -> None:
    assert "sparsefx" in torch._dynamo.list_backends()


@torch.no_grad()
@pytest.mark.parametrize("how", [{"fullgraph": True}, {"dynamic": True}, {"mode": "default"}])
def test_the_backend_by_name(how: dict[str, Any]) -> None:  # Any: torch.compile's own keywords
    model = two()
    options: dict[str, Any] | None = None if "mode" in how else {"guard": "off"}
    compiled = torch.compile(model, backend="sparsefx", options=options, **how)
    for rows in (4, 6):
        x = torch.randn(rows, 32)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
    assert len(sparsefx.explain(compiled).rows) >= 2


@torch.no_grad()
def test_max_autotune_reaches_inductor() -> None:
    model = two()
    compiled = torch.compile(model, backend="sparsefx", mode="max-autotune-no-cudagraphs")
    x = torch.randn(4, 32)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_backend_takes_a_recipe_and_leaves_the_weights_alone() -> None:
    torch.manual_seed(0)
    model = Two().eval()
    before = copy.deepcopy(model.state_dict())
    recipe = Recipe({"*": Unstructured(0.75)})
    options = {"recipe": recipe, "guard": "off"}
    compiled = torch.compile(
        model,
        backend="sparsefx",
        options=options,  # type: ignore[arg-type]  # torch has Inductor's options in mind
    )
    x = torch.randn(4, 32)
    expected = sparsefx.sparsify(model, recipe, progress=False)(x)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {row.kernel for row in sparsefx.explain(compiled).rows} == {"cpp_bitmap_linear"}


@torch.no_grad()
def test_graphs_of_one_model_share_a_session_and_go_with_it() -> None:
    model = two()
    for _ in range(2):
        compiled = torch.compile(model, backend="sparsefx", options={"guard": "off"}, dynamic=False)
        for rows in (3, 4):
            compiled(torch.randn(rows, 32))
        report = sparsefx.explain(compiled)
        assert report.facts["graphs"] == "2"
        assert {row.shape[-1] for row in report.rows} == {"3", "4"}
        torch._dynamo.reset()
        del compiled
        gc.collect()


@torch.no_grad()
def test_weights_changed_in_place_are_noticed() -> None:
    model = two()
    fast = sparsefx.compile(model, guard="off")
    x = torch.randn(4, 32)
    fast(x)
    model.first.weight.mul_(3.0)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    model.first.weight.normal_()  # and no longer sparse
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    model.load_state_dict(two(seed=1).state_dict())
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_two_models_of_one_class_do_not_share_weights() -> None:
    first, second = two(seed=0), two(seed=1)
    x = torch.randn(4, 32)
    for model in (first, second, first):
        compiled = torch.compile(model, backend="sparsefx", options={"guard": "off"})
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_one_compiled_block_called_for_many_layers() -> None:
    layers = [two(seed) for seed in range(12)]  # more than Dynamo's recompile limit
    compiled = [torch.compile(m, backend="sparsefx", options={"guard": "off"}) for m in layers]
    x = torch.randn(4, 32)
    for fast, model in zip(compiled, layers, strict=True):
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_model_of_a_class_of_torch_itself() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    model = sparsefx.sparsify(model, Recipe({"*": NM(2, 4)}), progress=False)
    fast = sparsefx.compile(model, guard="off")
    x = torch.randn(4, 32)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    assert type(fast) is nn.Sequential
    assert [row.name for row in sparsefx.explain(fast).rows] == ["0", "2"]
    assert all(row.kernel == "cpp_nm_linear" for row in sparsefx.explain(fast).rows)


@torch.no_grad()
def test_many_models_do_not_use_up_each_others_recompiles() -> None:
    x = torch.randn(4, 32)
    for seed in range(10):  # Dynamo's limit for one piece of code is 8
        fast = sparsefx.compile(two(seed), guard="off", dynamic=False)
        fast(x)
        assert sparsefx.explain(fast).facts["graphs"] == "1", f"model {seed}"


def test_gradients_keep_the_mask_and_change_no_number() -> None:
    model = two().train()
    fast = sparsefx.compile(model)
    x = torch.randn(4, 32)
    torch.testing.assert_close(fast(x), model(x))
    fast(x).square().sum().backward()
    gradient, weight = model.first.weight.grad, model.first.weight
    assert gradient is not None
    assert not gradient[weight == 0].any()
    assert gradient[weight != 0].any()
    assert all("gradients are on" in row.reason for row in sparsefx.explain(fast).rows)


def test_gradients_of_a_foreign_checkpoint_are_left_alone() -> None:
    model = Two()
    model.load_state_dict(two().state_dict())
    compiled = torch.compile(model, backend="sparsefx")
    x = torch.randn(4, 32)
    compiled(x).square().sum().backward()
    compiled_gradient = model.first.weight.grad
    assert compiled_gradient is not None
    model.zero_grad()
    model(x).square().sum().backward()
    torch.testing.assert_close(model.first.weight.grad, compiled_gradient)


@torch.no_grad()
def test_inference_mode_and_inference_tensors() -> None:
    with torch.inference_mode():
        model = two()
        fast = sparsefx.compile(model, guard="off")
        x = torch.randn(4, 32)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_compiled_model_can_be_copied_and_outlives_nothing() -> None:
    fast = sparsefx.compile(two(), guard="off")
    x = torch.randn(4, 32)
    expected = fast(x)
    clone = copy.deepcopy(fast)
    torch.testing.assert_close(clone(x), expected, rtol=1e-4, atol=1e-5)
    assert recall(clone) is None


def test_report_round_trip(tmp_path: object) -> None:
    fast = sparsefx.compile(two(), guard="off")
    with torch.no_grad():
        fast(torch.randn(4, 32))
    path = f"{tmp_path}/report.json"
    sparsefx.explain(fast).to_json(path)
    with open(path) as file:
        assert len(json.load(file)["rows"]) == 2


@torch.no_grad()
def test_chosen_kernels_can_be_dumped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEFX_DUMP", "kernels")
    monkeypatch.setenv("SPARSEFX_DUMP_FOLDER", str(tmp_path))
    sparsefx.compile(two(), guard="off")(torch.randn(4, 32))
    texts = [path.read_text() for path in (tmp_path / "kernels").iterdir()]
    assert len(texts) == 2  # with and without an epilogue
    assert all("2:4" in text.splitlines()[0] for text in texts)


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {  # Any: wrong types too
    "unknown target": ({"target": "tpu"}, errs.UnknownTarget, "'tpu'.*cpu, cuda"),
    "target of a wrong type": ({"target": 3}, errs.UnknownTarget, "3"),
    "unknown guard": ({"guard": "maybe"}, errs.UnknownOption, "measure, model, off"),
    "absent device": ({"target": "a100"}, errs.TargetUnavailable, "guard='model'"),
    "unmatched glob": ({"recipe": Recipe({"nope*": NM(2, 4)})}, errs.NothingMatches, "'nope\\*'"),
    "misfit": ({"recipe": Recipe({"*": NM(2, 5)})}, errs.PatternDoesNotFit, "multiple of m=5"),
    "recipe of a wrong type": ({"recipe": "2:4"}, errs.UnknownOption, "a sparsefx.Recipe"),
    "unknown mode": ({"mode": "turbo"}, errs.UnknownOption, "'turbo'.*max-autotune"),
    "empty calibration": ({"calibration": []}, errs.EmptyCalibration, "no batch"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_typed_error_and_changes_nothing(name: str) -> None:
    kwargs, error, text = BAD[name]
    model = two()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=text):
        sparsefx.compile(model, **kwargs)
    assert unchanged(model, before)
    assert model._compiled_call_impl is None


def test_nan_weights_are_refused_by_name() -> None:
    model = two()
    with torch.no_grad():
        model.second.weight[0, 0] = float("nan")
    with pytest.raises(errs.NonFiniteWeight, match="second.weight has 1 NaN"):
        sparsefx.compile(model)


def test_a_model_elsewhere_than_its_target() -> None:
    with pytest.raises(errs.DeviceMismatch, match="on meta but target 'cpu'"):
        sparsefx.compile(two().to("meta"), target="cpu")


def test_a_function_is_no_model() -> None:
    with pytest.raises(errs.UnknownOption, match="an nn.Module"):
        sparsefx.compile(len)  # type: ignore[type-var]  # what is tested


def test_backend_options_are_checked() -> None:
    compiled = torch.compile(two(), backend="sparsefx", options={"gard": "off"})
    with pytest.raises(Exception, match="options='gard' is not a choice"), torch.no_grad():
        compiled(torch.randn(2, 32))


def test_explain_of_something_else() -> None:
    with pytest.raises(errs.NotCompiled, match="Two was not compiled"):
        sparsefx.explain(two())
    with pytest.raises(errs.NotCompiled, match="builtin_function_or_method was not compiled"):
        sparsefx.explain(len)


@torch.no_grad()
def test_inputs_of_a_wrong_shape_fail_as_in_eager() -> None:
    fast = sparsefx.compile(two(), guard="off")
    with pytest.raises(RuntimeError):
        fast(torch.randn(4, 31))
    model = two()
    torch.testing.assert_close(fast(torch.ones(2, 32)), model(torch.ones(2, 32)))
