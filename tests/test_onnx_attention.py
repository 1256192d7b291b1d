"""export() of graphs with sparse attention: forms, opsets, sizes at run time, names, refusals."""

import copy
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from sparsefx.attention.operators import BLOCK, SKIP_SOFTMAX, THETA
from sparsefx.codegen.onnx.export import ExportFacts, export
from sparsefx.errors import ExportFailed, NotExportable
from sparsefx.graph import capture
from tests.attention_cases import Sizes
from tests.onnx_attention import exact_inputs

FORMS = ("standard", "functions")
ORDERS = ("ascending", "sink_diagonal")
SCALE, WINDOW, TILE = 0.25, 70, (32, 16)
THETA_OPTIONS = (12, "pre", "exp_threshold", True)


class Attention(nn.Module):
    """One sparse attention of four heads; `operator` is "skip", "theta" or "block"."""

    def __init__(self, operator: str, order: str = "sink_diagonal", is_causal: bool = True):
        super().__init__()
        self.operator, self.order, self.is_causal = operator, order, is_causal
        self.register_buffer("prefill", torch.linspace(0.5, 9.0, 4))
        self.register_buffer("decode", torch.linspace(40.0, 2.0, 4))
        self.register_buffer("lengths", torch.tensor([10, 40, 90]))
        self.register_buffer("theta", torch.linspace(2.03, 7.17, 12).view(4, 3))
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("keep", torch.rand(1, 4, 8, 16, generator=generator) < 0.6)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        place = (self.is_causal, SCALE, WINDOW)
        if self.operator == "skip":
            return SKIP_SOFTMAX(q, k, v, mask, self.prefill, self.decode, *place, *TILE, self.order)
        if self.operator == "theta":
            tables = (self.lengths, self.theta, None)
            return THETA(q, k, v, mask, *tables, *place, *THETA_OPTIONS)
        return BLOCK(q, k, v, mask, self.keep, *place, *TILE)


BATCH, QUERIES, KEYS = (
    Dim("batch", max=64), Dim("queries", max=200), Dim("keys", max=200)
)  # fmt: skip
Q, KV = {0: BATCH, 2: QUERIES}, {0: BATCH, 2: KEYS}


def inputs(sizes: Sizes, mask: str = "none") -> tuple[Tensor, ...]:
    """q, k, v and perhaps a mask [batch, 1, queries, keys], in float32."""
    q, k, v = (each.float() for each in exact_inputs(sizes, seed=7))
    if mask == "none":
        return q, k, v
    generator = torch.Generator().manual_seed(1)
    shown = torch.rand(sizes.batch, 1, sizes.queries, sizes.keys, generator=generator) < 0.8
    if mask == "bool":
        return q, k, v, shown
    return q, k, v, torch.where(shown, 0.5, float("-inf"))


def run(path: Path, given: tuple[Tensor, ...]) -> Tensor:
    session = onnxruntime.InferenceSession(path)
    feed = dict(zip(("q", "k", "v", "mask"), (t.numpy() for t in given), strict=False))
    return torch.from_numpy(session.run(None, feed)[0])


def check_graph(facts: ExportFacts, operator: str, count: int = 1) -> None:
    proto = onnx.load(facts.path)
    ours = [node for node in proto.graph.node if node.domain == "sparsefx"]
    domains = {item.domain for item in proto.opset_import}
    if facts.form == "functions":
        assert [node.op_type for node in ours] == [operator] * count
        assert domains == {"", "sparsefx"}
        assert len(proto.functions) == 1
    else:
        assert not ours
        assert domains == {""}
        assert not proto.functions
    assert [attention.operator for attention in facts.attentions] == [operator] * count
    assert all(attention.nodes < 100 for attention in facts.attentions)


NAMES = {"skip": "SkipSoftmaxAttention", "theta": "ThetaAttention", "block": "BlockAttention"}


@pytest.mark.parametrize(
    ("operator", "form", "opset"),
    [
        ("skip", "standard", 20), ("skip", "standard", 24),
        ("skip", "functions", 20), ("skip", "functions", 24),
        ("theta", "standard", 24), ("theta", "functions", 20),
        ("block", "standard", 24), ("block", "functions", 20),
    ],
)  # fmt: skip
def test_dynamic_sizes(operator, form, opset, tmp_path):
    model, example = Attention(operator), inputs(Sizes(queries=50, keys=70))
    dynamic = (Q, KV, KV)
    gm = capture(model, example, dynamic_shapes=dynamic)
    facts = export(
        gm, example, {}, tmp_path / "m.onnx",
        reference=model, dynamic_shapes=dynamic, form=form, opset=opset,
    )  # fmt: skip
    assert facts.max_abs_error < 1e-4
    assert len({shape["q"] for shape in facts.shapes}) == 3
    check_graph(facts, NAMES[operator])
    check_runs(facts, model, Sizes(batch=1, queries=130), Sizes(batch=3, queries=33, keys=64))


@pytest.mark.parametrize(
    ("operator", "mask"),
    [("skip", "bool"), ("skip", "float"), ("theta", "float"), ("block", "bool")],
)
def test_masks_of_dynamic_size(operator, mask, tmp_path):
    model, example = Attention(operator, "ascending", False), inputs(Sizes(), mask)
    dynamic = (Q, KV, KV, {0: BATCH, 2: QUERIES, 3: KEYS})
    gm = capture(model, example, dynamic_shapes=dynamic)
    facts = export(
        gm, example, {}, tmp_path / "m.onnx", reference=model, dynamic_shapes=dynamic
    )  # fmt: skip
    assert facts.max_abs_error < 1e-4
    check_runs(facts, model, Sizes(batch=1, queries=64, keys=101), mask=mask)


def check_runs(facts: ExportFacts, model: Attention, *tried: Sizes, mask: str = "none") -> None:
    """onnxruntime agrees with PyTorch at other sizes, where sparsity acts."""
    for sizes in tried:
        given = inputs(sizes, mask)
        expected = model(*given)
        torch.testing.assert_close(run(facts.path, given), expected, atol=1e-4, rtol=0)
        assert (dense(model, given) - expected).abs().max() > 1e-3


def dense(model: Attention, given: tuple[Tensor, ...]) -> Tensor:
    """What the model gives with thresholds that nothing falls below."""
    kept = copy.deepcopy(model)
    for name in ("prefill", "decode"):
        getattr(kept, name).zero_()
    kept.theta.fill_(-1e9)
    kept.keep.fill_(True)
    return kept(*given)


@pytest.mark.parametrize("form", FORMS)
def test_one_query_votes_by_group(form, tmp_path):
    model, example = Attention("skip"), inputs(Sizes(queries=1))
    dynamic = ({0: BATCH}, KV, KV)
    gm = capture(model, example, dynamic_shapes=dynamic)
    path = tmp_path / "m.onnx"
    facts = export(gm, example, {}, path, reference=model, dynamic_shapes=dynamic, form=form)
    check_graph(facts, "SkipSoftmaxAttention")
    check_runs(facts, model, Sizes(queries=1), Sizes(batch=3, queries=1, keys=97))


def test_one_query_where_their_number_is_dynamic(tmp_path):
    """torch.export assumes two or more; the file is right for one, too."""
    model, example = Attention("skip"), inputs(Sizes())
    dynamic = (Q, KV, KV)
    gm = capture(model, example, dynamic_shapes=dynamic)
    facts = export(gm, example, {}, tmp_path / "m.onnx", reference=model, dynamic_shapes=dynamic)
    check_runs(facts, model, Sizes(queries=1), Sizes(batch=1, queries=1, keys=95))


@pytest.mark.parametrize("operator", ["skip", "theta"])
def test_half(operator, tmp_path):
    example = tuple(each.half() for each in inputs(Sizes()))
    model = Attention(operator)
    gm = capture(model, example)
    facts = export(gm, example, {}, tmp_path / "m.onnx", reference=model)
    found = run(facts.path, example)
    assert found.dtype is torch.float16
    torch.testing.assert_close(found, model(*example), atol=2e-3, rtol=0)


def test_float64_and_bfloat16_are_refused(tmp_path):
    model = Attention("skip")
    for dtype in (torch.float64, torch.bfloat16):
        example = tuple(each.to(dtype) for each in inputs(Sizes()))
        gm = capture(model, example)
        with pytest.raises(NotExportable, match=r"float\(\)"):
            export(gm, example, {}, tmp_path / "m.onnx", reference=model)
    assert not list(tmp_path.iterdir())


def test_layers_share_a_function_and_keep_their_names(tmp_path):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Attention("skip"), Attention("skip")])
            self.layers[1].prefill.mul_(0.5)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.layers[1](self.layers[0](q, k, v) + q, k, v)

    model, example = Two(), inputs(Sizes())
    gm = capture(model, example)
    for form in FORMS:
        facts = export(gm, example, {}, tmp_path / form, reference=model, form=form)
        check_graph(facts, "SkipSoftmaxAttention", 2)
        assert [each.name for each in facts.attentions] == ["layers.0", "layers.1"]
        stored = {tensor.name for tensor in onnx.load(facts.path).graph.initializer}
        assert {"layers.0.prefill", "layers.1.prefill"} <= stored


class Perturbed(nn.Module):
    """A model whose result is changed in the first `rows` rows of a head, by `amount`."""

    def __init__(self, model: nn.Module, rows: int, amount: float) -> None:
        super().__init__()
        self.model, self.rows, self.amount = model, rows, amount

    def forward(self, *given: Tensor) -> Tensor:
        result = self.model(*given)
        result[0, 0, : self.rows] += self.amount
        return result


def test_a_score_at_its_threshold_may_fall_on_either_side(tmp_path):
    example = inputs(Sizes())
    path = tmp_path / "m.onnx"
    model = Attention("theta")
    gm = capture(model, example)
    facts = export(gm, example, {}, path, reference=Perturbed(model, 1, 0.001))
    assert 0.0005 < facts.max_abs_error < 0.002
    with pytest.raises(ExportFailed, match="differ by"):
        export(gm, example, {}, path, reference=Perturbed(model, 100, 0.002))
    block = Attention("block")  # has no thresholds, so nothing may fall
    gm = capture(block, example)
    with pytest.raises(ExportFailed, match="differ by"):
        export(gm, example, {}, path, reference=Perturbed(block, 1, 0.001))
