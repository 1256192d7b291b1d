"""Names of weights and inputs that an ONNX file must keep, and the mode of the model."""

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import sparsefx


class Awkward(nn.Module):
    """Parameters called like what passes add, equal parameters, an input that is an output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w_masked = nn.Parameter(torch.randn(16, 32))
        self.weight_values = nn.Parameter(torch.randn(32, 16))
        self.first, self.second = nn.LayerNorm(32), nn.LayerNorm(32)  # fresh: equal numbers

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        middle = torch.relu(nn.functional.linear(self.first(x), self.w_masked))
        return self.second(nn.functional.linear(middle, self.weight_values)), x


def exported(model: nn.Module, x: Tensor, path: Path) -> onnx.GraphProto:
    sparsefx.export_onnx(model, (x,), path)
    return onnx.load(path).graph


def test_every_parameter_and_input_keeps_its_name(tmp_path: Path) -> None:
    model = Awkward().eval()
    graph = exported(model, torch.randn(4, 32), tmp_path / "m.onnx")
    stored = {tensor.name for tensor in graph.initializer}
    assert {name for name, _ in model.named_parameters()} <= stored
    assert [value.name for value in graph.input] == ["x"]
    assert [value.name for value in graph.output][1] == "x_out"


def test_equal_constants_are_stored_once(tmp_path: Path) -> None:
    class Repeats(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x.sigmoid() + 0.7) * (x.tanh() + 0.7)

    graph = exported(Repeats(), torch.randn(4, 8), tmp_path / "m.onnx")
    assert len(graph.initializer) == 1


def test_a_model_in_training_mode_is_exported_as_it_infers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.5))
    model[1].eval()  # a mode of its own
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = exported(model, torch.randn(4, 16), tmp_path / "m.onnx")
    assert not any(node.op_type == "Dropout" for node in graph.node)
    assert [module.training for module in model] == [True, False, True]
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_failed_export_gives_the_mode_back(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5))
    with pytest.raises(sparsefx.errors.ExportFailed):
        sparsefx.export_onnx(model, (torch.randn(4, 15),), tmp_path / "m.onnx")
    assert all(module.training for module in model.modules())
