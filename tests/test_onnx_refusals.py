"""export(): what it refuses, and what it leaves behind when it fails: nothing."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import sparsefx
from sparsefx.codegen.onnx.export import export
from sparsefx.errors import ExportFailed, NotExportable, UnknownOption
from sparsefx.graph import capture
from tests.onnx_graphs import packed_mlp, sparse_mlp


def broken(model: nn.Module) -> Callable[..., object]:
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.get_parameter("down.bias")[0] += 0.01
    return wrong


def test_a_failing_check_leaves_no_file(tmp_path):
    model, x = sparse_mlp(), torch.randn(4, 32)
    with pytest.raises(ExportFailed, match=r"differ by 0\.005.*No file was written"):
        export(packed_mlp(model, x), (x,), {}, tmp_path / "m.onnx", reference=broken(model))
    assert list(tmp_path.iterdir()) == []


class Cancels(nn.Module):
    """Adds a large number and takes it away: fp16 arithmetic keeps multiples of 2, fp32 all."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + 3000 + self.bias) - 3000


def test_half_precision_is_judged_by_float32(tmp_path):
    model, x = Cancels().half(), torch.randn(4, 8).half()
    gm = capture(model, (x,))
    facts = export(gm, (x,), {}, tmp_path / "m.onnx", reference=model)
    assert facts.max_abs_error < 0.01  # against fp32; fp16 PyTorch is wrong by up to 1
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.bias[0] = 8.0
    with pytest.raises(ExportFailed, match="differ by 8"):
        export(gm, (x,), {}, tmp_path / "w.onnx", reference=wrong)


def test_a_failing_check_keeps_the_older_file(tmp_path):
    model, x = sparse_mlp(), torch.randn(4, 32)
    path = tmp_path / "m.onnx"
    path.write_bytes(b"older")
    with pytest.raises(ExportFailed):
        export(packed_mlp(model, x), (x,), {}, path, reference=broken(model), one_file=1000)
    assert path.read_bytes() == b"older"
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_a_reference_of_another_shape_fails(tmp_path):
    model, x = sparse_mlp(), torch.randn(4, 32)
    with pytest.raises(ExportFailed, match="shapes"):
        export(
            packed_mlp(model, x), (x,), {}, tmp_path / "m.onnx", reference=lambda x: model(x)[:1]
        )
    assert list(tmp_path.iterdir()) == []


def test_without_check_the_reference_is_not_called(tmp_path):
    model, x = sparse_mlp(), torch.randn(4, 32)

    def never(x: torch.Tensor) -> torch.Tensor:
        raise AssertionError("called")

    facts = export(
        packed_mlp(model, x), (x,), {}, tmp_path / "m.onnx", reference=never, check=False
    )
    assert facts.max_abs_error is None
    assert facts.shapes == ()
    assert facts.path.exists()


@pytest.mark.parametrize(
    ("option", "error", "words"),
    [
        ({"form": "compact"}, UnknownOption, "form='compact'.*standard, functions"),
        ({"opset": 23}, NotExportable, "batch 1.*opset=20 or opset=24"),
        ({"opset": 17}, UnknownOption, "opset=17.*20, 24"),
    ],
)
def test_refused_options(option, error, words, tmp_path):
    model, x = sparse_mlp(), torch.randn(4, 32)
    gm = capture(model, (x,))
    with pytest.raises(error, match=words):
        export(gm, (x,), {}, tmp_path / "m.onnx", reference=model, **option)
    assert list(tmp_path.iterdir()) == []


def test_refuses_bfloat16(tmp_path):
    model, x = sparse_mlp(torch.bfloat16), torch.randn(4, 32, dtype=torch.bfloat16)
    with pytest.raises(NotExportable, match=r"bfloat16.*\.float\(\)"):
        export(capture(model, (x,)), (x,), {}, tmp_path / "m.onnx", reference=model)


def test_refuses_masks_that_are_left(tmp_path):
    model, x = sparse_mlp(), torch.randn(4, 32)
    gm = capture(model, (x,))
    gm.register_buffer("keep", model.up.weight != 0)
    weight = next(n for n in gm.graph.find_nodes(op="get_attr") if n.target == "up.weight")
    with gm.graph.inserting_after(weight):
        keep = gm.graph.get_attr("keep")
    with gm.graph.inserting_after(keep):
        masked = gm.graph.call_function(torch.ops.sparsefx.mask.default, (weight, keep))
    weight.replace_all_uses_with(masked, delete_user_cb=lambda user: user is not masked)
    gm.recompile()
    with pytest.raises(NotExportable, match="FoldMasks"):
        export(gm, (x,), {}, tmp_path / "m.onnx", reference=model)


def test_an_operator_that_onnx_lacks_is_named(tmp_path):
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.eigvalsh(x)

    model, x = Odd(), torch.eye(3)
    with pytest.raises(ExportFailed, match=r"eigh"):
        export(capture(model, (x,)), (x,), {}, tmp_path / "m.onnx", reference=model)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "dynamic_shapes"),
    [((torch.randn(4, 31),), None), ((), None), ((torch.randn(4, 32),), ({}, {}))],
    ids=["wrong width", "too few", "dynamic_shapes of another structure"],
)
def test_arguments_that_the_model_does_not_take(args, dynamic_shapes, tmp_path):
    with pytest.raises(ExportFailed, match="torch.export.*Call the model with these arguments"):
        sparsefx.export_onnx(
            sparse_mlp(), args, tmp_path / "m.onnx", dynamic_shapes=dynamic_shapes, check=False
        )
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_module_is_refused(tmp_path):
    with pytest.raises(UnknownOption, match="nn.Module"):
        sparsefx.export_onnx(torch.relu, (torch.randn(2),), tmp_path / "m.onnx")


def test_a_folder_of_that_name_is_refused(tmp_path):
    model, x = sparse_mlp(), torch.randn(4, 32)
    with pytest.raises(ExportFailed, match="folder of that name"):
        export(packed_mlp(model, x), (x,), {}, tmp_path, reference=model)
    assert list(tmp_path.iterdir()) == []
