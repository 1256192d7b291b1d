"""A state folder goes with one model, one graph and one set of options, and with whole files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sparsefx
from sparsefx.calibrate.digest import digest
from sparsefx.calibrate.sequential import run_blocks
from sparsefx.errors import ForeignCalibration
from tests.block_visits import needs_of, wanda

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two layers, a buffer, a plain tensor, and an activation and a constant in the code alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 64), nn.Linear(64, 4)
        self.register_buffer("scale", torch.ones(8), persistent=False)
        self.table = torch.ones(8)
        self.slope, self.act = 0.5, F.relu

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.act(self.first(x * self.scale * self.table)) * self.slope
        out: Tensor = self.last(hidden)
        return out


def one_weight(model: Net) -> None:
    with torch.no_grad():
        model.first.weight.view(-1)[3] += 1


def one_of_a_buffer(model: Net) -> None:
    model.get_buffer("scale")[5] = 2


def a_constant_tensor(model: Net) -> None:
    model.table = torch.cat([torch.ones(7), torch.zeros(1)])


def a_number(model: Net) -> None:
    model.slope = 0.25


def an_activation(model: Net) -> None:
    model.act = F.gelu


CHANGES = [one_weight, one_of_a_buffer, a_constant_tensor, a_number, an_activation]
RECIPE = sparsefx.Recipe({"*": sparsefx.NM(2, 4, sparsefx.Wanda())})


@pytest.mark.parametrize("change", CHANGES)
def test_the_state_of_another_model_is_refused(
    tmp_path: Path, change: Callable[[Net], None]
) -> None:
    def run(model: Net) -> Net:
        return sparsefx.sparsify(model, RECIPE, [X], progress=False, state=tmp_path)

    whole = run(Net())
    again = run(Net())
    assert torch.equal(whole.last.weight, again.last.weight)
    other = Net()
    change(other)
    with pytest.raises(ForeignCalibration, match="another model"):
        run(other)


def test_a_digest_is_of_values_not_of_how_they_lie_in_memory() -> None:
    model = Net()
    first = digest(model, ["asked"])
    model.first.weight = nn.Parameter(model.first.weight.detach().T.contiguous().T)
    assert not model.first.weight.is_contiguous()
    assert digest(model, ["asked"]) == first != digest(model, ["other"])
    assert digest(model.bfloat16(), ["asked"]) != first
    with torch.device("meta"):
        assert digest(Net(), []) == digest(Net(), [])


def flip_in_a_tensor(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-50] ^= 0xFF
    path.write_bytes(content)


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, object]], None]) -> None:
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        fields = json.loads(file.metadata()["sparsefx"])
    change(tensors, fields)
    save_file(tensors, path, {"sparsefx": json.dumps(fields)})


def another_fact(path: Path) -> None:
    rewrite(path, lambda tensors, fields: fields.update(facts={"layers": []}))


def another_shape(path: Path) -> None:
    rewrite(
        path,
        lambda tensors, fields: tensors.update({k: v.flatten() for k, v in tensors.items()}),
    )


def a_missing_tensor(path: Path) -> None:
    rewrite(path, lambda tensors, fields: tensors.clear())


def no_checksum(path: Path) -> None:
    rewrite(path, lambda tensors, fields: fields.pop("checksum"))


DAMAGES = [flip_in_a_tensor, another_fact, another_shape, a_missing_tensor, no_checksum]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    model = Net()

    def run() -> None:
        run_blocks(model, [X], needs_of(model), wanda, state=tmp_path, progress=False).close()

    run()
    run()
    damage(tmp_path / "block-00000.safetensors")
    with pytest.raises(ForeignCalibration, match="damaged"):
        run()
