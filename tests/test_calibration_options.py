"""Options of calibration that make no sense are refused by name, before anything runs."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.errors import UnknownOption

RECIPE = sparsefx.Recipe({"*": sparsefx.NM(2, 4, sparsefx.Wanda())})


class Untouched:
    """Batches that must not be asked for."""

    def __iter__(self) -> Iterator[Tensor]:
        raise AssertionError("the data were read")


@pytest.mark.parametrize("value", ["1GB", -1, math.nan, 1e9, True], ids=repr)
def test_memory_is_a_number_of_bytes(value: object) -> None:
    model = nn.Linear(8, 8)
    with pytest.raises(UnknownOption, match="max_memory="):
        sparsefx.sparsify(model, RECIPE, Untouched(), max_memory=value)  # type: ignore[arg-type]
    with pytest.raises(UnknownOption, match="max_memory="):
        sparsefx.sensitivity(model, RECIPE, Untouched(), max_memory=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [5, b"folder", ["folder"]], ids=repr)
def test_state_is_the_path_of_a_folder(value: object) -> None:
    with pytest.raises(UnknownOption, match="state="):
        sparsefx.sparsify(nn.Linear(8, 8), RECIPE, Untouched(), state=value)  # type: ignore[arg-type]


def test_no_memory_at_all_is_a_choice() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(4, 8)
    all_on_disk = sparsefx.sparsify(model, RECIPE, [x], progress=False, max_memory=0)
    in_memory = sparsefx.sparsify(model, RECIPE, [x], progress=False)
    for mine, other in zip(all_on_disk.parameters(), in_memory.parameters(), strict=True):
        assert torch.equal(mine, other)
