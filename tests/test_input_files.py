"""Files of inputs: batches come back in order, and a file that is none says what is wrong."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sparsefx.errors import UnreadableInput
from sparsefx.input_files import load_batches


def ids(*shape: int) -> Tensor:
    return torch.randint(64, shape, generator=torch.Generator().manual_seed(0))


def test_numbered_batches_come_in_order_and_may_differ_in_length(tmp_path: Path) -> None:
    path = tmp_path / "text.safetensors"
    lengths = [5 + at for at in range(12)]  # "10" sorts before "2" as text
    tensors = {f"input_ids.{at}": ids(1, length) for at, length in enumerate(lengths)}
    tensors |= {f"attention_mask.{at}": torch.ones(1, n) for at, n in enumerate(lengths)}
    save_file(tensors, path)
    batches = load_batches(path)
    assert [batch["input_ids"].shape[1] for batch in batches] == lengths
    assert all(set(batch) == {"input_ids", "attention_mask"} for batch in batches)
    assert torch.equal(batches[10]["input_ids"], tensors["input_ids.10"])


def test_a_stack_is_as_good_as_numbers(tmp_path: Path) -> None:
    path = tmp_path / "text.safetensors"
    stack = ids(3, 2, 7)
    save_file({"input_ids": stack, **{f"mask.{at}": torch.ones(2, 7) for at in range(3)}}, path)
    batches = load_batches(path)
    assert len(batches) == 3
    for batch, expected in zip(batches, stack, strict=True):
        assert torch.equal(batch["input_ids"], expected)
        assert batch["mask"].shape == (2, 7)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({}, "holds no batch"),
        ({"input_ids": torch.zeros(0, 1, 8)}, "holds no batch"),
        ({"input_ids": ids(1, 8)}, "input_ids of shape (1, 8) is no stack of batches"),
        ({"input_ids.1": ids(1, 8)}, "input_ids are not numbered from 0 to 0"),
        ({"input_ids.0": ids(1, 8), "input_ids.2": ids(1, 8)}, "not numbered from 0 to 1"),
        ({"input_ids.0": ids(1, 8), "input_ids": ids(1, 1, 8)}, "input_ids is there twice"),
        ({"input_ids.0": ids(1, 8), "mask": ids(2, 1, 8)}, "other numbers of batches"),
        ({"input_ids.00": ids(1, 8)}, "input_ids.00 of shape (1, 8) is no stack"),
        ({"input_ids." + "9" * 5000: ids(1, 8)}, "is no stack of batches"),
    ],
)
def test_files_that_hold_no_batches(tmp_path: Path, tensors: dict[str, Tensor], says: str) -> None:
    path = tmp_path / "text.safetensors"
    save_file(tensors, path)
    with pytest.raises(UnreadableInput, match=r"Name its tensors input_ids\.0") as caught:
        load_batches(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "text.pt"
    torch.save({"input_ids.0": ids(1, 8)}, path)  # noqa: TID251  (what must be refused)
    with pytest.raises(UnreadableInput, match="not a safetensors file"):
        load_batches(path)
    with pytest.raises(UnreadableInput, match="no such file"):
        load_batches(tmp_path / "nowhere.safetensors")
