"""export(): forms, sizes, names, checks and refusals, on small models."""

import copy
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim

import sparsefx
from sparsefx.codegen.onnx.export import export
from sparsefx.graph import capture
from sparsefx.spec import NM
from tests.onnx_graphs import fuse, pack, packed_mlp, sparse_mlp

FORMS = ("standard", "functions")
FOLDED_AWAY = {
    "ScatterElements",
    "CumSum",
    "BitShift",
    "BitwiseAnd",
    "Expand",
    "Transpose",
    "Slice",
}


class ConvNet(nn.Module):
    """Convolutions with groups, batch norm, adaptive pooling, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, groups=4, stride=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.deep(nn.functional.silu(self.norm(self.stem(x))))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


def initializers(path: Path) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}


def optimised_operators(path: Path) -> list[str]:
    """What is left after onnxruntime's own constant folding."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path.with_suffix(".optimised"))
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    onnxruntime.InferenceSession(path, options)
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


BATCH = ({0: Dim("batch")},)


@pytest.mark.parametrize("opset", [20, 24])
@pytest.mark.parametrize("form", FORMS)
def test_dense_mlp(form, opset, tmp_path):
    model, x = sparse_mlp(), torch.randn(4, 32)
    gm = capture(model, (x,), dynamic_shapes=BATCH)
    facts = export(
        gm,
        (x,),
        {},
        tmp_path / "m.onnx",
        reference=model,
        dynamic_shapes=BATCH,
        form=form,
        opset=opset,
    )
    assert facts.max_abs_error < 1e-5
    assert len({shape["x"] for shape in facts.shapes}) == 3
    assert facts.bytes == (tmp_path / "m.onnx").stat().st_size
    assert facts.weights == ()
    assert {i.domain: i.version for i in onnx.load(facts.path).opset_import}[""] == opset
    names = set(initializers(facts.path))
    assert names >= set(model.state_dict())


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_packed_mlp_folds_to_plain_matmuls(form, dtype, rank, tmp_path):
    model, x = sparse_mlp(dtype), torch.randn(*(4, 6)[: rank - 1], 32).to(dtype)
    dynamic = (dict.fromkeys(range(rank - 1), Dim.AUTO),)
    gm = packed_mlp(model, x, dynamic)
    path = tmp_path / "m.onnx"
    facts = export(gm, (x,), {}, path, reference=model, dynamic_shapes=dynamic, form=form)
    assert facts.max_abs_error < (1e-5 if dtype is torch.float32 else 1e-2)
    left = optimised_operators(path)
    assert not set(left) & FOLDED_AWAY
    assert left.count("MatMul") + left.count("Gemm") == 3


@pytest.mark.parametrize("form", FORMS)
def test_packed_names_and_domains(form, tmp_path):
    model, x = sparse_mlp(), torch.randn(4, 32)
    path = tmp_path / "m.onnx"
    export(packed_mlp(model, x), (x,), {}, path, reference=model, form=form)
    proto = onnx.load(path)
    assert set(initializers(path)) >= {
        "up.weight.values", "up.weight.codes", "up.bias",
        "middle.weight.values", "middle.weight.gaps",
        "down.weight", "down.bias",
    }  # fmt: skip
    assert not {"up.weight", "middle.weight"} & set(initializers(path))
    packed = [node.op_type for node in proto.graph.node if node.domain == "sparsefx"]
    domains = {item.domain: item.version for item in proto.opset_import}
    if form == "functions":
        assert packed == ["NMLinear", "BitmapLinear"]
        assert domains["sparsefx"] == 1
        assert len(proto.functions) == 4  # two linears, two decompressors
    else:
        assert packed == []
        assert set(domains) == {""}
        assert not proto.functions
    assert not proto.graph.sparse_initializer


def test_file_tells_nothing_of_the_machine(tmp_path):
    model, x = sparse_mlp(), torch.randn(4, 32)
    path = tmp_path / "m.onnx"
    export(packed_mlp(model, x), (x,), {}, path, reference=model)
    assert str(Path(__file__).parent).encode() not in path.read_bytes()


def test_stored_bytes(tmp_path):
    model, x = sparse_mlp(width=256), torch.randn(4, 32)
    facts = export(packed_mlp(model, x), (x,), {}, tmp_path / "m.onnx", reference=model)
    shares = {weight.name: weight.stored_bytes / weight.dense_bytes for weight in facts.weights}
    assert shares["up.weight"] <= 0.55
    assert shares["middle.weight"] <= 0.30
    stored = initializers(facts.path)
    for weight in facts.weights:
        parts = [t for name, t in stored.items() if name.startswith(f"{weight.name}.")]
        assert sum(len(part.raw_data) for part in parts) == weight.stored_bytes


@pytest.mark.parametrize("form", FORMS)
def test_epilogues_with_operands(form, tmp_path):
    model, x = sparse_mlp(), torch.randn(4, 32)
    gm = packed_mlp(model, x)
    nodes = {str(node.target): node for node in gm.graph.nodes}
    fuse(gm, nodes["sparsefx.nm_linear.default"], nodes["aten.relu.default"], "relu", [])
    nodes = {str(node.target): node for node in gm.graph.nodes}
    residual = nodes["sparsefx.nm_linear.default"]
    bitmap = nodes["sparsefx.bitmap_linear.default"]
    fuse(gm, bitmap, nodes["aten.add.Tensor"], "add 0", [residual])
    facts = export(gm, (x,), {}, tmp_path / "m.onnx", reference=model, form=form)
    assert facts.max_abs_error < 1e-5
    if form == "functions":
        kinds = {node.op_type: node for node in onnx.load(facts.path).graph.node}
        assert set(kinds) == {"NMLinear", "BitmapLinear", "Gemm", "Mul"}
        epilogue = {a.name: a for a in kinds["BitmapLinear"].attribute}["epilogue"]
        assert epilogue.s == b"add 0"


def test_weight_used_twice_is_stored_once(tmp_path):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(40, 16)
            self.inner = nn.Linear(16, 16, bias=False)
            self.head = nn.Linear(16, 40, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.inner(self.inner(self.embed(ids))))

    torch.manual_seed(0)
    model, ids = Twice().eval(), torch.randint(0, 40, (2, 5))
    with torch.no_grad():
        model.inner.weight *= NM(2, 4).keep(model.inner.weight.abs())
    gm = capture(model, (ids,))
    assert pack(gm, lambda name, _: (2, 4) if name == "inner.weight" else None) == 2
    facts = export(gm, (ids,), {}, tmp_path / "m.onnx", reference=model)
    assert [weight.name for weight in facts.weights] == ["inner.weight"]
    big = [
        name for name, tensor in initializers(facts.path).items() if list(tensor.dims) == [40, 16]
    ]
    assert len(big) == 1


def test_conv_net(tmp_path):
    torch.manual_seed(0)
    model, x = ConvNet().eval(), torch.rand(2, 3, 12, 14)
    dynamic = ({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},)
    gm = capture(model, (x,), dynamic_shapes=dynamic)
    facts = export(gm, (x,), {}, tmp_path / "m.onnx", reference=model, dynamic_shapes=dynamic)
    assert facts.max_abs_error < 1e-5
    assert set(initializers(facts.path)) >= {"stem.weight", "deep.weight", "head.weight"}


def test_large_weights_go_to_a_data_file(tmp_path):
    model, x = sparse_mlp(), torch.randn(4, 32)
    path = tmp_path / "m.onnx"
    facts = export(packed_mlp(model, x), (x,), {}, path, reference=model, one_file=1000)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert facts.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    session = onnxruntime.InferenceSession(path)
    (y,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x))


def test_aliased_inputs(tmp_path):
    class Two(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a @ b.T - 2 * a.sum()

    model, x = Two(), torch.randn(4, 4)
    facts = export(capture(model, (x, x)), (x, x), {}, tmp_path / "m.onnx", reference=model)
    assert facts.max_abs_error < 1e-5
    assert set(facts.shapes[0]) == {"a", "b"}


def test_keyword_arguments_in_any_order(tmp_path):
    class Minus(nn.Module):
        def forward(self, a: torch.Tensor, *, b: torch.Tensor, c: int = 1) -> torch.Tensor:
            return a - c * b

    model, kwargs = Minus(), {"c": 3, "b": torch.randn(3)}
    gm = capture(model, (torch.randn(3),), kwargs)
    facts = export(gm, (torch.randn(3),), kwargs, tmp_path / "m.onnx", reference=model)
    assert facts.max_abs_error < 1e-6


def test_derived_sizes_stay_legal(tmp_path):
    class Pairs(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(x.shape[0] // 2, 2, 3).sum(1)

    model, x = Pairs(), torch.randn(8, 3)
    dynamic = ({0: 2 * Dim("half", min=1, max=9)},)
    gm = capture(model, (x,), dynamic_shapes=dynamic)
    facts = export(gm, (x,), {}, tmp_path / "m.onnx", reference=model, dynamic_shapes=dynamic)
    sizes = [shape["x"][0] for shape in facts.shapes]
    assert len(set(sizes)) == 3
    assert all(size % 2 == 0 and 2 <= size <= 18 for size in sizes)


def test_the_model_is_left_as_it_was(tmp_path):
    model, x = sparse_mlp(), torch.randn(4, 32)
    gm = packed_mlp(model, x)
    before, code = copy.deepcopy(model.state_dict()), gm.code
    export(gm, (x,), {}, tmp_path / "m.onnx", reference=model)
    assert gm.code == code
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize("form", FORMS)
def test_the_whole_way_from_a_model(form, tmp_path):
    model, x = sparse_mlp(width=256), torch.randn(4, 32)
    before = copy.deepcopy(model.state_dict())
    path = tmp_path / "m.onnx"
    sparsefx.export_onnx(model, (x,), path, dynamic_shapes=BATCH, form=form)
    (y,) = onnxruntime.InferenceSession(path).run(None, {"x": torch.ones(3, 32).numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(torch.ones(3, 32)).detach())
    assert set(initializers(path)) >= {"up.weight.codes", "middle.weight.gaps", "down.weight"}
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    if form == "functions":
        packed = [node for node in onnx.load(path).graph.node if node.domain == "sparsefx"]
        epilogues = [a.s for node in packed for a in node.attribute if a.name == "epilogue"]
        assert epilogues == [b"relu", b"add 0"]
