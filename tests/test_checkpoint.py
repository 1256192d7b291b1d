"""Sparse checkpoints round-trip bit for bit, are small, and refuse another model's file."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsefx.annotations import annotations
from sparsefx.api import sparsify
from sparsefx.checkpoint import load, save
from sparsefx.errors import CheckpointMismatch
from sparsefx.quantise import LARGEST
from sparsefx.spec import NM, Block, Pattern, Recipe, Unstructured
from tests.checkpoints import Zoo, layout_of, raw, snapshot, split, zoo

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PATTERNS = st.one_of(
    st.sampled_from([NM(n, m) for m in (4, 8, 16) for n in (1, m // 2, m - 1)]),
    st.builds(Unstructured, st.floats(0, 0.99)),
    st.just(Block(4, 4, 0.5)),
    st.builds(
        replace,
        st.sampled_from([NM(2, 4), NM(1, 8), Unstructured(0.6)]),
        values=st.sampled_from([*LARGEST]),
        group=st.sampled_from([0, 16, 32, 128]),
    ),
    st.builds(Block, st.just(4), st.just(4), st.just(0.5), values=st.sampled_from([*LARGEST])),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**31),
    PATTERNS,
    st.sampled_from([4, 8, 20]),
    st.sampled_from([16, 48]),
    st.sampled_from(DTYPES),
)
def test_any_pattern_round_trips_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    pattern: Pattern,
    out: int,
    width: int,
    dtype: torch.dtype,
) -> None:
    folder = tmp_path_factory.getbasetemp() / "round_trip"
    model = zoo(pattern, seed, out, width, dtype)
    save(model, folder)
    target = zoo(None, seed + 1, out, width, dtype)
    assert load(folder, target) is target
    assert snapshot(target) == snapshot(model), seed
    assert annotations(target) == annotations(model)
    assert target.head.weight is target.embed.weight


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 2**31),
    st.lists(st.integers(1, 20), max_size=4),
    st.floats(0, 1),
    st.sampled_from([*DTYPES, torch.float64, torch.int64, torch.bool, torch.uint8]),
)
def test_any_shape_round_trips_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    shape: list[int],
    density: float,
    dtype: torch.dtype,
) -> None:
    folder = tmp_path_factory.getbasetemp() / "any_shape"
    torch.manual_seed(seed)
    model, target = nn.Module(), nn.Module()
    tensor = (torch.randn(shape).abs() * 9).masked_fill(torch.rand(shape) >= density, 0)
    model.register_buffer("w", tensor.to(dtype))
    target.register_buffer("w", torch.ones(shape, dtype=dtype))
    save(model, folder)
    assert snapshot(load(folder, target)) == snapshot(model), seed


@pytest.mark.parametrize(
    ("pattern", "ratio", "kind"),
    [
        (NM(2, 4), 0.60, "nm"),
        (Unstructured(0.5), 0.65, "bitmap"),
        (NM(1, 8), 0.20, "nm"),
        (Unstructured(0.8), 0.30, "bitmap"),
    ],
)
def test_the_file_is_small(tmp_path: Path, pattern: Pattern, ratio: float, kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 256, bias=False), nn.Linear(256, 512, bias=False)).half()
    save(sparsify(model, Recipe({"*": pattern}), progress=False), tmp_path)
    dense_bytes = sum(2 * parameter.numel() for parameter in model.parameters())
    written = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert written <= ratio * dense_bytes
    assert {entry["kind"] for entry in layout_of(tmp_path)["tensors"].values()} == {kind}


def test_each_tensor_takes_its_smallest_layout_along_the_axis_of_its_groups(tmp_path: Path) -> None:
    model = zoo(NM(1, 8))
    model.embed.weight.data[3:] = 0
    save(model, tmp_path)
    layout = layout_of(tmp_path)
    assert layout["tensors"]["linear.weight"] == {
        "kind": "nm", "shape": [16, 32], "dtype": "float32", "axis": 1, "n": 1, "m": 8
    }  # fmt: skip
    assert layout["tensors"]["conv.weight"]["axis"] == 1  # input channels
    assert layout["tensors"]["linear.bias"]["kind"] == "dense"
    assert layout["tensors"]["embed.weight"]["kind"] == "bitmap"
    assert layout["aliases"] == {"head.weight": "embed.weight"}
    transposed = nn.Module()
    transposed.register_buffer("w", model.linear.weight.detach().t().contiguous())
    save(transposed, tmp_path)
    assert layout_of(tmp_path)["tensors"]["w"]["axis"] == 0  # as transformers' Conv1D stores it


def test_dense_models_are_stored_dense_under_their_own_names(tmp_path: Path) -> None:
    save(zoo(), tmp_path)
    header, _ = split(tmp_path / "model.safetensors")
    assert set(header) == {"__metadata__", *zoo().state_dict()} - {"head.weight"}


def test_negative_zero_in_a_packed_weight_becomes_zero(tmp_path: Path) -> None:
    model = zoo(NM(2, 4))
    model.linear.weight.data *= -1
    save(model, tmp_path)
    loaded = load(tmp_path, zoo())
    assert torch.equal(loaded.linear.weight, model.linear.weight)  # -0.0 == 0.0


def test_recipe_lies_beside_and_goes_with_the_next_save(tmp_path: Path) -> None:
    recipe = Recipe({"*.mlp.*": NM(2, 4), "*": None})
    save(zoo(), tmp_path, recipe=recipe)
    assert Recipe.from_toml(tmp_path / "recipe.toml") == recipe
    save(zoo(), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"model.safetensors", "annotations.toml"}


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    save(zoo(NM(2, 4)), tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    model = zoo()
    model.register_buffer("strange", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(CheckpointMismatch, match=r"strange is of type torch\.complex128"):
        save(model, tmp_path)
    clash = nn.Module()
    clash.register_buffer("w", zoo(NM(2, 4)).linear.weight.detach())
    clash.register_buffer("w:index", torch.ones(3))
    with pytest.raises(CheckpointMismatch, match="two tensors would be stored as w:index"):
        save(clash, tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_masks_alone_zero_the_weights_and_keep_the_rest(tmp_path: Path) -> None:
    pruned = zoo(NM(2, 4))
    save(pruned, tmp_path, masks_only=True)
    other = zoo(seed=1, dtype=torch.bfloat16)
    expected = snapshot(other)
    for name in ("linear.weight", "conv.weight"):
        keep = pruned.state_dict()[name] != 0
        weight = other.state_dict()[name].masked_fill(~keep, 0)
        expected[name] = (weight.dtype, weight.shape, raw(weight))
    assert snapshot(load(tmp_path, other)) == expected
    assert annotations(other) == annotations(pruned)
    assert (tmp_path / "model.safetensors").stat().st_size < 1200  # 1088 bits and the header


def test_an_untied_model_gets_both_copies_and_a_tied_one_refuses_two(tmp_path: Path) -> None:
    tied, untied = zoo(NM(2, 4)), zoo(seed=1)
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    save(untied, tmp_path / "untied")
    save(tied, tmp_path / "tied")
    assert snapshot(load(tmp_path / "tied", untied)) == snapshot(tied)
    with pytest.raises(CheckpointMismatch, match=r"head\.weight is tied to embed\.weight"):
        load(tmp_path / "untied", tied)


def widened() -> Zoo:
    return zoo(width=64)


def with_extra() -> Zoo:
    model = zoo()
    model.register_buffer("extra", torch.zeros(2))
    return model


def without_scale() -> Zoo:
    model = zoo()
    del model.scale
    return model


def on_meta() -> nn.Module:
    return zoo().to("meta")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (widened, "linear.weight is (16, 32) there and (16, 64) in the model"),
        (lambda: zoo(dtype=torch.float16), "is torch.float32 there and torch.float16"),
        (with_extra, "it has no extra"),
        (without_scale, "it has scale"),
        (on_meta, "on meta here"),
    ],
)
def test_another_models_checkpoint_is_refused(
    tmp_path: Path, make: Callable[[], nn.Module], says: str
) -> None:
    save(zoo(NM(2, 4)), tmp_path)
    model = make()
    before = {} if says.startswith("on meta") else snapshot(model)
    with pytest.raises(CheckpointMismatch) as caught:
        load(tmp_path, model)
    assert says in str(caught.value)
    assert annotations(model) == {}
    assert before == {} or snapshot(model) == before


def test_all_files_have_the_permissions_of_new_files(tmp_path: Path) -> None:
    save(zoo(), tmp_path / "out", recipe=Recipe(weights={"*": NM(2, 4)}))
    (tmp_path / "new").touch()
    wanted = (tmp_path / "new").stat().st_mode
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 3
    assert set(modes.values()) == {wanted}, modes
