"""The repeated blocks of a model, and a graph cut into segments at them."""

import pytest
import torch
from torch import Tensor, nn

from examples.dinov2 import DinoV2Saliency
from sparsefx.calibrate.blocks import block_of, common_owner, repeated_blocks
from sparsefx.calibrate.inputs import layer_uses
from sparsefx.calibrate.segments import cuts
from sparsefx.graph import capture
from sparsefx.prune.weights import prunable_weights
from tests import hf_models


def blocks(model: nn.Module) -> frozenset[str]:
    return repeated_blocks({name: each.numel() for name, each in model.named_parameters()})


def layers_by_block(model: nn.Module) -> dict[str | None, int]:
    found = blocks(model)
    counts: dict[str | None, int] = {}
    for name in prunable_weights(model):
        block = block_of(name, found)
        counts[block] = counts.get(block, 0) + 1
    return counts


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("llama", {"model.layers.0": 7, "model.layers.1": 7, None: 1}),
        ("bert", {"encoder.layer.0": 6, "encoder.layer.1": 6, None: 1}),
        ("gpt2", {"transformer.h.0": 4, "transformer.h.1": 4, None: 1}),
        ("vit", {"layers.0": 6, "layers.1": 6, None: 2}),
        ("t5_encoder", {"encoder.block.0": 6, "encoder.block.1": 6}),
        ("mixtral", {"model.layers.0": 6, "model.layers.1": 6, None: 1}),
    ],
)
def test_transformers(case: str, expected: dict[str | None, int]) -> None:
    assert layers_by_block(hf_models.CASES[case]().model) == expected


def test_dinov2() -> None:
    counts = layers_by_block(DinoV2Saliency(2))
    assert counts == {None: 2, **{f"layer.{number}": 6 for number in range(12)}}


class Residual(nn.Module):
    """Two convolutions; the ReLUs write into what they get."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.relu(self.bn1(self.conv1(x))))
        y += x
        out: Tensor = self.relu(y)
        return out


class Stages(nn.Module):
    """A stem, three stages, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.layer1 = nn.Sequential(Residual(4), Residual(4))
        self.layer2 = nn.Sequential(Residual(4), Residual(4))
        self.layer3 = nn.Sequential(Residual(4), Residual(4))
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


def test_stages_of_a_cnn() -> None:
    assert layers_by_block(Stages()) == {"layer1": 4, "layer2": 4, "layer3": 4, None: 2}


def test_a_stage_that_is_most_of_the_model_gives_way_to_its_own_blocks() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))))
    assert blocks(model) == {"0", "1.0", "1.1", "1.2"}


def test_layers_of_an_mlp() -> None:
    mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    assert blocks(mlp) == {"0", "2", "4"}


def test_a_model_without_families_has_none() -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    assert blocks(model) == frozenset()


def test_block_of_a_module_called_again() -> None:
    assert block_of("layers.1@2.fc.weight", frozenset({"layers.1"})) == "layers.1"
    assert block_of("layers.11.fc.weight", frozenset({"layers.1"})) is None


def test_common_owner() -> None:
    assert common_owner(["a.b.weight", "a.b.bias"]) == "a.b"
    assert common_owner(["a.b.weight", "a.c.weight"]) == "a"
    assert common_owner(["a.weight", "b.weight"]) == ""


def entered(model: nn.Module, *args: Tensor) -> list[str | None]:
    """The blocks in the order of the cuts, every prunable weight asked."""
    gm = capture(model.eval(), args)
    asked = {alias: name for name, w in prunable_weights(model).items() for alias in w.names}
    return [cut.block for cut in cuts(gm.graph, blocks(model), layer_uses(gm, asked))]


def test_cuts_of_a_cnn_with_writes_in_place() -> None:
    order = entered(Stages(), torch.randn(2, 3, 8, 8))
    assert order == [None, "layer1", "layer2", "layer3", None]


def test_no_cut_between_a_tensor_and_a_write_into_it() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(x.add_(1))
            return out

    model = nn.Sequential(nn.Linear(4, 4), Writing(), nn.Linear(4, 4))
    assert entered(model, torch.randn(2, 4)) == [None, "0", "2"]  # 0 and 1 as one


def test_no_cut_between_two_uses_of_one_weight() -> None:
    first, second, third = (nn.Linear(4, 4) for _ in range(3))
    assert entered(nn.Sequential(first, second, third), torch.randn(2, 4)) == [None, "0", "1", "2"]
    again = nn.Sequential(first, second, third, first)
    assert entered(again, torch.randn(2, 4)) == [None, "0"]
