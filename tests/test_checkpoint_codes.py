"""Codes in checkpoints: found again bit for bit, in few bytes, refused where they are hostile."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsefx.annotations import annotate, annotations
from sparsefx.api import sparsify
from sparsefx.checkpoint import load, save
from sparsefx.checkpoint.layout import KEY
from sparsefx.errors import CheckpointMismatch, CorruptCheckpoint
from sparsefx.spec import NM, Block, Pattern, Recipe, Unstructured
from tests.checkpoints import Json, Zoo, joined, layout_of, snapshot, split, zoo
from tests.test_checkpoint_hostile import Edit, set_byte, set_entry


@pytest.mark.parametrize(
    ("pattern", "most"),
    [
        # Bytes of codes, indices or bits, and 16-bit scales, a weight.
        (NM(2, 4, values="int4"), 0.25 + 0.125 + 2 / 128),
        (NM(2, 4, values="int8"), 0.5 + 0.125 + 2 / 256),
        (NM(2, 4, values="fp8"), 0.5 + 0.125 + 2 / 256),
        (NM(2, 4, values="int8_dynamic"), 0.5 + 0.125 + 2 / 256),
        (Unstructured(0.8, values="int4"), 0.1 + 0.125 + 2 / 128),
        (Block(1, 16, 0.5, values="int4"), 0.25 + 0.125 + 2 / 16),
    ],
    ids=str,
)
def test_codes_take_the_bytes_of_their_kind(tmp_path: Path, pattern: Pattern, most: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512, bias=False, dtype=torch.bfloat16))
    model = sparsify(model, Recipe({"*": pattern}), progress=False)
    save(model, tmp_path)
    _, data = split(tmp_path / "model.safetensors")
    assert len(data) <= most * model[0].weight.numel() + 8
    target = nn.Sequential(nn.Linear(256, 512, bias=False, dtype=torch.bfloat16))
    assert snapshot(load(tmp_path, target)) == snapshot(model)
    assert annotations(target) == {"0.weight": pattern}


def test_codes_are_found_without_annotations(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64))
    pattern = NM(2, 4, values="int4")
    rounded = sparsify(model, Recipe({"*": pattern}), progress=False).state_dict()
    model.load_state_dict(rounded)
    save(model, tmp_path)
    entry = layout_of(tmp_path)["tensors"]["0.weight"]
    assert (entry["values"], entry["tile"]) == ("int4", [1, 128])
    assert snapshot(load(tmp_path, nn.Sequential(nn.Linear(256, 64)))) == snapshot(model)


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_codes_of_a_convolution_are_found(tmp_path: Path, kind: str) -> None:
    model = sparsify(
        zoo(dtype=torch.float16), Recipe({"conv.weight": Unstructured(0.6, values=kind, group=0)})
    )
    save(model, tmp_path)
    entry = layout_of(tmp_path)["tensors"]["conv.weight"]
    assert (entry["values"], entry["axis"]) == (kind, 1)
    assert entry["tile"] in ([9, 16], [1, 16]), "3 x 3 taps, 16 channels"
    assert snapshot(load(tmp_path, zoo(seed=1, dtype=torch.float16))) == snapshot(model)


def two_bytes(tensor: str, offset: int, first: int, second: int) -> Edit:
    def edit(header: Json, layout: Json, data: bytearray) -> None:
        set_byte(tensor, offset, first)(header, layout, data)
        set_byte(tensor, offset + 1, second)(header, layout, data)

    return edit


HOSTILE: dict[str, tuple[Edit, str]] = {
    "a scale that is no number": (two_bytes("linear.weight:scales", 2, 0xC0, 0x7F), "no numbers"),
    "an infinite scale": (two_bytes("linear.weight:scales", 2, 0x80, 0x7F), "infinite"),
    "a negative scale": (set_byte("linear.weight:scales", 3, 0xBF), "negative"),
    "int4 of -8": (set_byte("linear.weight:values", 0, 0x88), "codes beyond 7"),
    "int8 of -128": (set_byte("conv.weight:values", 0, 0x80), "codes beyond 127"),
    "values unknown": (set_entry("linear.weight", values="int3"), "no known values"),
    "values a list": (set_entry("linear.weight", values=[]), "no known values"),
    "another kind": (set_entry("linear.weight", values="int8"), "is not stored as"),
    "another tile": (set_entry("linear.weight", tile=[1, 8]), "is not stored as"),
    "a tile of nothing": (set_entry("linear.weight", tile=[0, 16]), "cannot have a scale"),
    "a tile too large": (set_entry("linear.weight", tile=[1, 2**62]), "cannot have a scale"),
    "three sizes": (set_entry("linear.weight", tile=[1, 1, 1]), "no valid tile"),
    "a tile in words": (set_entry("linear.weight", tile="1x16"), "no valid tile"),
    "no tile": (lambda header, layout, data: tensor(layout).pop("tile"), "unknown fields"),
    "no values": (lambda header, layout, data: tensor(layout).pop("values"), "unknown fields"),
    "dense codes": (set_entry("linear.bias", values="int8", tile=[1, 1]), "unknown fields"),
}


def tensor(layout: Json) -> Json:
    found: Json = layout["tensors"]["linear.weight"]
    return found


def coded() -> Zoo:
    recipe = Recipe(
        {"linear.*": NM(2, 4, values="int4", group=16), "conv.*": Unstructured(0.5, values="int8")}
    )
    return sparsify(zoo(), recipe, inplace=True, progress=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coded")
    save(coded(), folder)
    return folder


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_codes_are_refused(checkpoint: Path, tmp_path: Path, case: str) -> None:
    edit, says = HOSTILE[case]
    header, data = split(checkpoint / "model.safetensors")
    layout, changed = json.loads(header["__metadata__"][KEY]), bytearray(data)
    edit(header, layout, changed)
    header["__metadata__"][KEY] = json.dumps(layout)
    (tmp_path / "model.safetensors").write_bytes(joined(header, bytes(changed)))
    model = zoo(seed=1)
    before = snapshot(model)
    with pytest.raises((CorruptCheckpoint, CheckpointMismatch)) as caught:
        load(tmp_path, model)
    assert says in str(caught.value)
    assert snapshot(model) == before


def test_a_spare_nibble_is_zero(tmp_path: Path) -> None:
    model = nn.Linear(16, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()[0, :3] = torch.tensor([7.0, -3, 2])  # three codes, four nibbles
    annotate(model, {"weight": Unstructured(0.6, values="int4")})
    save(model, tmp_path)
    path = tmp_path / "model.safetensors"
    header, data = split(path)
    assert layout_of(tmp_path)["tensors"]["weight"]["values"] == "int4"
    changed = bytearray(data)
    changed[header["weight:values"]["data_offsets"][1] - 1] |= 0x10
    path.write_bytes(joined(header, bytes(changed)))
    with pytest.raises(CorruptCheckpoint, match="codes behind its last one"):
        load(tmp_path, nn.Linear(16, 1, bias=False))
