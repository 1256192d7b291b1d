"""Damaged and hostile checkpoints raise a typed error and leave the model as it was."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from sparsefx.annotations import annotate, annotate_attention, annotations, attention_thresholds
from sparsefx.api import sparsify
from sparsefx.checkpoint import load, save
from sparsefx.checkpoint.layout import KEY
from sparsefx.checkpoint.thresholds import THRESHOLDS_KEY
from sparsefx.errors import CheckpointMismatch, CorruptCheckpoint
from sparsefx.spec import NM, Recipe, Unstructured
from tests.checkpoints import SKIP, THETA, Json, Zoo, joined, snapshot, split, zoo

Edit = Callable[[Json, Json, bytearray], None]


def set_entry(tensor: str, **fields: object) -> Edit:
    return lambda header, layout, data: layout["tensors"][tensor].update(fields)


def set_header(tensor: str, **fields: object) -> Edit:
    return lambda header, layout, data: header[tensor].update(fields)


def set_byte(tensor: str, offset: int, value: int) -> Edit:
    def edit(header: Json, layout: Json, data: bytearray) -> None:
        data[header[tensor]["data_offsets"][0] + offset] = value

    return edit


def rename(old: str, new: str) -> Edit:
    return lambda header, layout, data: header.update({new: header.pop(old)})


HUGE = 2**62
OTHER = replace(SKIP, order="ascending")

HOSTILE: dict[str, tuple[Edit, str]] = {
    "index not ascending": (set_byte("linear.weight:index", 0, 0b00000101), "do not ascend"),
    "index repeated": (set_byte("linear.weight:index", 5, 0), "do not ascend"),
    "bit added": (set_byte("conv.weight:bits", 0, 0xFF), "another number of values"),
    "bits cleared": (set_byte("conv.weight:bits", 0, 0), "another number of values"),
    "other m": (set_entry("linear.weight", m=8, n=4), "is not stored as"),
    "m = 3": (set_entry("linear.weight", m=3), "cannot be 2:3"),
    "n = m": (set_entry("linear.weight", n=4), "cannot be 4:4"),
    "n negative": (set_entry("linear.weight", n=-2), "cannot be -2:4"),
    "n a text": (set_entry("linear.weight", n="2"), "whole numbers"),
    "axis outside": (set_entry("linear.weight", axis=2), "cannot be packed along 2"),
    "huge shape": (set_entry("linear.weight", shape=[HUGE, HUGE]), "is not stored as"),
    "huge number": (set_entry("linear.weight", shape=[2**80, 4]), "no valid shape"),
    "negative shape": (set_entry("linear.weight", shape=[-16, -32]), "no valid shape"),
    "zero shape": (set_entry("linear.weight", shape=[0, 32]), "cannot be packed"),
    "many dimensions": (set_entry("linear.weight", shape=[1] * 65), "no valid shape"),
    "shape a text": (set_entry("linear.weight", shape="16"), "no valid shape"),
    "dtype of no type": (set_entry("linear.weight", dtype="Tensor"), "no known dtype"),
    "dtype of another": (set_entry("linear.bias", dtype="int32"), "is not stored as torch.int32"),
    "packed integers": (set_entry("linear.weight", dtype="int32"), "cannot be packed"),
    "kind unknown": (set_entry("linear.weight", kind="pickle"), "no known kind"),
    "kind unhashable": (set_entry("linear.weight", kind=[]), "no known kind"),
    "mask among weights": (set_entry("conv.weight", kind="keep"), "mixes masks with weights"),
    "unknown field": (set_entry("linear.weight", code="x"), "missing or unknown fields"),
    "version": (lambda header, layout, data: layout.update(version=2), "not of version 1"),
    "field missing": (lambda header, layout, data: layout.pop("aliases"), "unknown fields"),
    "tensors a list": (lambda header, layout, data: layout.update(tensors=[]), "wrong type"),
    "alias of nothing": (
        lambda header, layout, data: layout.update(aliases={"head.weight": "nowhere"}),
        "alias head.weight does not",
    ),
    "stored under another name": (rename("linear.bias", "linear.b"), "linear.bias is not stored"),
    "stored type": (set_header("linear.bias", dtype="I32"), "linear.bias is not stored as"),
    "stored shape": (set_header("linear.bias", shape=[4, 4]), "linear.bias is not stored as"),
    "stored shape too large": (set_header("linear.bias", shape=[HUGE]), "header"),
    "stored offsets": (set_header("linear.bias", data_offsets=[0, 64]), "header"),
    "stored beyond the end": (set_header("linear.bias", data_offsets=[0, HUGE]), "header"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save(mixed(), folder)
    return folder


def mixed(seed: int = 0) -> Zoo:
    """N:M in the linear, a bitmap in the convolution, dense elsewhere; thresholds of two kinds."""
    recipe = Recipe({"linear.*": NM(2, 4), "conv.*": Unstructured(0.5)})
    model = sparsify(zoo(seed=seed), recipe, inplace=True, progress=False)
    annotate_attention(model, {"layers.0": SKIP, "layers.1": THETA})
    return model


def assert_refused_or_valid(folder: Path) -> bool:
    """Loads into a fresh model; whatever happens, the model stays whole. True if it was refused."""
    model = zoo(seed=1)
    annotate(model, {"linear.weight": NM(1, 4)})
    annotate_attention(model, {"layers.0": OTHER})
    before = snapshot(model)
    try:
        load(folder, model)
    except (CorruptCheckpoint, CheckpointMismatch):
        assert snapshot(model) == before
        assert annotations(model) == {"linear.weight": NM(1, 4)}
        assert attention_thresholds(model) == {"layers.0": OTHER}
        return True
    shapes = {name: (dtype, shape) for name, (dtype, shape, _) in before.items()}
    after = snapshot(model)
    assert {name: (dtype, shape) for name, (dtype, shape, _) in after.items()} == shapes
    return False


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(checkpoint: Path, tmp_path: Path, case: str) -> None:
    edit, says = HOSTILE[case]
    header, data = split(checkpoint / "model.safetensors")
    layout, changed = json.loads(header["__metadata__"][KEY]), bytearray(data)
    edit(header, layout, changed)
    header["__metadata__"][KEY] = json.dumps(layout)
    (tmp_path / "model.safetensors").write_bytes(joined(header, bytes(changed)))
    assert assert_refused_or_valid(tmp_path)
    with pytest.raises((CorruptCheckpoint, CheckpointMismatch)) as caught:
        load(tmp_path, zoo())
    assert says in str(caught.value)


def test_an_index_of_m_or_more_is_refused(tmp_path: Path) -> None:
    """Four bits could address columns 8 to 15 of a group of 8: beyond the end of the last row."""
    save(zoo(NM(1, 8)), tmp_path)
    path = tmp_path / "model.safetensors"
    header, data = split(path)
    start, end = header["linear.weight:index"]["data_offsets"]
    for at in (start, end - 1):
        changed = bytearray(data)
        changed[at] = 0xF8
        path.write_bytes(joined(header, bytes(changed)))
        with pytest.raises(CorruptCheckpoint, match="do not ascend below m=8"):
            load(tmp_path, zoo())


@pytest.mark.parametrize(
    ("weight", "part", "says"),
    [
        (torch.eye(9), "w:bits", "bits set behind its last column"),
        (torch.eye(4).repeat(1, 3), "w:index", "indices behind its last value"),
    ],
)
def test_padding_behind_the_last_column_must_be_zero(
    tmp_path: Path, weight: torch.Tensor, part: str, says: str
) -> None:
    model, path = nn.Module(), tmp_path / "model.safetensors"
    model.register_buffer("w", weight)
    save(model, tmp_path)
    header, data = split(path)
    changed = bytearray(data)
    changed[header[part]["data_offsets"][1] - 1] |= 0x80
    path.write_bytes(joined(header, bytes(changed)))
    with pytest.raises(CorruptCheckpoint, match=says):
        load(tmp_path, model)


def test_names_that_occur_twice_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    header, data = split(checkpoint / "model.safetensors")
    text = json.dumps(header).encode()
    bias = json.dumps(header["linear.bias"]).encode()
    twice = text.replace(b'"linear.bias":', b'"linear.bias": ' + bias + b', "linear.bias":', 1)
    (tmp_path / "model.safetensors").write_bytes(joined(twice, data))
    with pytest.raises(CorruptCheckpoint, match="one name twice"):
        load(tmp_path, zoo())
    layout = header["__metadata__"][KEY]
    header["__metadata__"][KEY] = layout.replace('"version": 1', '"version": 1, "version": 1')
    (tmp_path / "model.safetensors").write_bytes(joined(header, data))
    with pytest.raises(CorruptCheckpoint, match="one name twice"):
        load(tmp_path, zoo())


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", "[" * 100_000, '{"version": ' + "9" * 5000 + "}", '"\\ud800"']
)
def test_layouts_that_are_no_layout_are_refused(
    checkpoint: Path, tmp_path: Path, text: str
) -> None:
    header, data = split(checkpoint / "model.safetensors")
    header["__metadata__"][KEY] = text
    (tmp_path / "model.safetensors").write_bytes(joined(header, data))
    assert assert_refused_or_valid(tmp_path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path, zoo())
    save_file({"w": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CorruptCheckpoint, match="without a sparsefx layout"):
        load(tmp_path, zoo())
    pickled = tmp_path / "model.safetensors"
    torch.save(zoo().state_dict(), pickled)  # noqa: TID251  (what must be refused)
    with pytest.raises(CorruptCheckpoint, match="nothing was loaded"):
        load(tmp_path, zoo())


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("weights = 3", CorruptCheckpoint),
        ('[[weights]]\nmatch = "linear.weight"\npattern = "nm"\nn = 9\nm = 4', CorruptCheckpoint),
        ('[attention]\nmethod = "theta"\nk = 4', CorruptCheckpoint),
        ('[[weights]]\nmatch = "other"\npattern = "nm"\nn = 2\nm = 4', CheckpointMismatch),
    ],
)
def test_hostile_annotations_are_refused(tmp_path: Path, text: str, error: type[Exception]) -> None:
    save(mixed(), tmp_path)
    (tmp_path / "annotations.toml").write_text(text)
    model = zoo(seed=1)
    before = snapshot(model)
    with pytest.raises(error):
        load(tmp_path, model)
    assert snapshot(model) == before


MUTATIONS = st.one_of(
    st.tuples(st.just("flip"), st.floats(0, 1, exclude_max=True), st.integers(1, 255)),
    st.tuples(st.just("flip header"), st.floats(0, 1, exclude_max=True), st.integers(1, 255)),
    st.tuples(st.just("truncate"), st.floats(0, 1, exclude_max=True), st.just(0)),
    st.tuples(st.just("extend"), st.just(0.0), st.integers(1, 40)),
    st.tuples(st.just("cut out"), st.floats(0, 1, exclude_max=True), st.integers(1, 40)),
    st.tuples(st.just("double"), st.floats(0, 1, exclude_max=True), st.integers(1, 40)),
)


def mutate(content: bytes, kind: str, where: float, amount: int) -> bytes:
    header_end = 8 + int.from_bytes(content[:8], "little")
    at = int(where * (header_end if kind == "flip header" else len(content)))
    at = min(at, len(content) - 1)
    match kind:
        case "flip" | "flip header":
            return content[:at] + bytes([content[at] ^ amount]) + content[at + 1 :]
        case "truncate":
            return content[:at]
        case "extend":
            return content + bytes(amount)
        case "cut out":
            return content[:at] + content[at + amount :]
        case _:
            return content[: at + amount] + content[at:]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(MUTATIONS, min_size=1, max_size=3))
def test_random_corruption_never_escapes(
    checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
    mutations: list[tuple[str, float, int]],
) -> None:
    content = (checkpoint / "model.safetensors").read_bytes()
    for mutation in mutations:
        content = mutate(content, *mutation) or b"\0"
    folder = tmp_path_factory.getbasetemp() / "corrupt"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(content)
    assert_refused_or_valid(folder)


JSON_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=3),
    st.lists(st.integers(-1, 64), max_size=3), st.sampled_from(["nm", "bitmap", "float32", "U8"]),
)  # fmt: skip


@settings(max_examples=250, deadline=None, derandomize=True)
@given(st.data(), JSON_VALUES, st.sampled_from([None, KEY, THRESHOLDS_KEY]))
def test_random_edits_of_the_description_never_escape(
    checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    value: object,
    part: str | None,
) -> None:
    """`part` is the text of the metadata that is edited, None for the header itself."""
    header, content = split(checkpoint / "model.safetensors")
    root = table = header if part is None else json.loads(header["__metadata__"][part])
    while True:  # walk down to a random leaf
        keys = sorted(table) if isinstance(table, dict) else list(range(len(table)))
        key = data.draw(st.sampled_from(keys))
        inner = table[key]
        if not isinstance(inner, dict | list) or not inner or data.draw(st.integers(0, 9)) == 0:
            break
        table = inner
    if data.draw(st.booleans()):
        table[key] = value
    else:
        del table[key]
    if part is not None:
        header["__metadata__"][part] = json.dumps(root)
    folder = tmp_path_factory.getbasetemp() / "edited"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(joined(header, content))
    assert_refused_or_valid(folder)


def test_flips_in_values_are_legal_data(checkpoint: Path, tmp_path: Path) -> None:
    header, data = split(checkpoint / "model.safetensors")
    changed = bytearray(data)
    changed[header["linear.weight:values"]["data_offsets"][0]] ^= 1
    (tmp_path / "model.safetensors").write_bytes(joined(header, bytes(changed)))
    assert not assert_refused_or_valid(tmp_path)
