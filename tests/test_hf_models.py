"""Hugging Face models of every kind: no break of our own, no candidate lost, numbers kept."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

import sparsefx
from sparsefx.errors import ExportFailed
from sparsefx.graph import capture
from sparsefx.passes import pipelines
from sparsefx.pipeline import PassContext, run
from sparsefx.prune.weights import prunable_weights
from tests.compilers import eager_compiler
from tests.hf_models import CASES, Case

RECIPE = sparsefx.Recipe(
    {
        "*patch_embeddings*": None,
        "*conv*": None,
        "*attention*": sparsefx.Unstructured(0.5),
        "*self_attn*": sparsefx.Unstructured(0.5),
        "*": sparsefx.NM(2, 4),
    }
)
names = pytest.mark.parametrize("name", CASES)


def pruned(name: str, *sizes: int) -> Case:
    torch.manual_seed(0)
    case = CASES[name](*sizes)
    known = [key for key in RECIPE.weights if key == "*" or _matches(case, key)]
    recipe = sparsefx.Recipe({key: RECIPE.weights[key] for key in known})
    return case._replace(model=sparsefx.sparsify(case.model, recipe, progress=False))


def _matches(case: Case, key: str) -> bool:
    return any(key.strip("*") in name for name in prunable_weights(case.model))


# Any: what a model returns differs from model to model, and from its graph.
def output(case: Case, kwargs: dict[str, object], call: Callable[..., Any]) -> torch.Tensor:
    result = call(**kwargs)
    first: torch.Tensor = result.logits if hasattr(result, "logits") else result[0]
    return first


def eager_graphs(case: Case) -> int:
    """How many graphs torch.compile makes of the model without us."""
    graphs: list[fx.GraphModule] = []

    def count(gm: fx.GraphModule, inputs: object) -> fx.GraphModule:
        graphs.append(gm)
        return gm

    torch._dynamo.reset()
    torch.compile(case.model, backend=count)(**case.kwargs)
    torch._dynamo.reset()
    return len(graphs)


@names
@torch.no_grad()
def test_dynamo_door(name: str) -> None:
    case = pruned(name)
    expected_graphs = eager_graphs(case)
    compiler = eager_compiler(name)
    compiled = torch.compile(case.model, backend=compiler)
    expected = output(case, case.kwargs, case.model)
    torch.testing.assert_close(output(case, case.kwargs, compiled), expected, rtol=1e-4, atol=1e-5)
    rows = [row for graph in compiler.session.graphs for row in graph.rows]
    assert len(compiler.session.graphs) == expected_graphs
    counts = Counter(row.op for row in rows)
    assert (counts["linear"], counts["attention"]) == (case.linears, case.attentions)
    assert all(bool(row.kernel) != bool(row.reason) for row in rows)
    assert any(row.kernel == "cpp_nm_linear" for row in rows)
    assert compiler.session.report().check() == []


@pytest.mark.parametrize("name", sorted(set(CASES) - {"vit", "whisper_encoder"}))
@torch.no_grad()
def test_a_new_length_costs_one_recompile(name: str) -> None:
    case = pruned(name)
    torch._dynamo.reset()
    compiler = eager_compiler(name)
    compiled = torch.compile(case.model, backend=compiler)
    compiled(**case.kwargs)
    first = len(compiler.session.graphs)
    for sizes in ((3, 9), (2, 12), (4, 5)):
        kwargs = CASES[name](*sizes).kwargs
        expected = output(case, kwargs, case.model)
        result = output(case, kwargs, compiled)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    assert len(compiler.session.graphs) == first + 1


# torch.export has no place for the cache object that a model returns.
@pytest.mark.parametrize("name", sorted(set(CASES) - {"llama_cached"}))
@torch.no_grad()
def test_export_door(name: str) -> None:
    case = pruned(name)
    gm = capture(case.model, (), case.kwargs)
    ctx = PassContext()
    counts = run(gm, pipelines.packing(), ctx)
    assert counts["pack_nm"] + counts["pack_bitmap"] == counts["detect"] > 0
    expected = output(case, case.kwargs, case.model)
    torch.testing.assert_close(output(case, case.kwargs, gm), expected, rtol=1e-4, atol=1e-5)
    ops = Counter(row.op for row in ctx.rows.values())
    assert (ops["linear"], ops["attention"]) == (case.linears, case.attentions)


@torch.no_grad()
def test_linears_are_as_many_as_a_walk_over_the_model_counts() -> None:
    case = pruned("bert")
    walked = sum(isinstance(module, torch.nn.Linear) for module in case.model.modules())
    compiler = eager_compiler("bert")
    torch._dynamo.reset()
    torch.compile(case.model, backend=compiler)(**case.kwargs)
    assert sum(row.op == "linear" for row in compiler.session.graphs[0].rows) == walked


@torch.no_grad()
def test_stacked_experts_get_a_row_and_a_reason() -> None:
    case = pruned("mixtral")
    compiler = eager_compiler("mixtral")
    torch._dynamo.reset()
    torch.compile(case.model, backend=compiler)(**case.kwargs)
    experts = [row for row in compiler.session.graphs[0].rows if row.op == "experts"]
    assert len(experts) == 4  # two layers, gate_up and down
    assert all("3-d" in row.reason for row in experts)


@pytest.mark.parametrize("name", ["llama_padded", "whisper_encoder", "gpt2"])
def test_export_to_onnx_is_checked(name: str, tmp_path: Path) -> None:
    case = pruned(name)
    report = sparsefx.export_onnx(case.model, (), tmp_path / "m.onnx", kwargs=case.kwargs)
    assert float(report.facts["largest |onnxruntime - PyTorch|"]) < 1e-5
    packed = [row for row in report.rows if "stored packed" in row.reason]
    assert len(packed) >= case.linears - 1  # GPT-2's head is its embedding, and stays dense
    assert report.check() == []


def test_what_torch_onnx_cannot_export_is_one_typed_error(tmp_path: Path) -> None:
    case = pruned("mixtral")  # its grouped product has no ONNX function
    with pytest.raises(ExportFailed, match="grouped_mm"):
        sparsefx.export_onnx(case.model, (), tmp_path / "m.onnx", kwargs=case.kwargs)
    assert list(tmp_path.iterdir()) == []
