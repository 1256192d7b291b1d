"""Attention thresholds travel in a checkpoint unchanged; what save cannot write, load refuses."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from sparsefx.annotations import annotate_attention, attention_thresholds
from sparsefx.attention.spec import DENOMINATORS, ORDERS, PLACEMENTS, TILES
from sparsefx.attention.thresholds import AttentionThresholds, SkipThresholds, ThetaThresholds
from sparsefx.checkpoint import load, save
from sparsefx.checkpoint import thresholds as module
from sparsefx.checkpoint.layout import KEY
from sparsefx.checkpoint.thresholds import THRESHOLDS_KEY
from sparsefx.errors import CheckpointMismatch, CorruptCheckpoint
from tests.checkpoints import SKIP, THETA, Json, joined, snapshot, split, zoo

Table = tuple[tuple[float, ...], ...]
FINITE = st.floats(allow_nan=False, allow_infinity=False)
SHARES = st.none() | st.floats(0, 1)
POSITIVE = st.floats(0, allow_infinity=False, allow_nan=False)


@st.composite
def skips(draw: st.DrawFn) -> SkipThresholds:
    heads = draw(st.integers(1, 5))
    factors = st.tuples(*[POSITIVE] * heads)
    tile, keys = st.sampled_from(TILES), sorted(draw(st.tuples(*[st.integers(0, 2**40)] * 2)))
    return SkipThresholds(
        prefill=draw(factors),
        decode=draw(factors),
        tile=draw(st.tuples(tile, tile)),
        order=draw(st.sampled_from(ORDERS)),
        keys=(keys[0], keys[1]),
        skipped=draw(st.tuples(SHARES, SHARES)),
        error=draw(st.tuples(st.none() | POSITIVE, st.none() | POSITIVE)),
        lost_mass=draw(st.tuples(SHARES, SHARES)),
        r2=draw(st.tuples(st.none() | FINITE, st.none() | FINITE)),
    )


@st.composite
def thetas(draw: st.DrawFn) -> ThetaThresholds:
    heads, denominator = draw(st.integers(1, 4)), draw(st.sampled_from(DENOMINATORS))
    lengths = sorted(draw(st.lists(st.integers(1, 2**40), min_size=1, max_size=4)))

    def table(
        numbers: st.SearchStrategy[float],
    ) -> st.SearchStrategy[tuple[tuple[float, ...], ...]]:
        return st.tuples(*[st.tuples(*[numbers] * len(lengths))] * heads)

    return ThetaThresholds(
        k=draw(st.integers(1, 2**40)),
        lengths=tuple(lengths),
        theta=draw(table(FINITE)),
        lost=draw(table(POSITIVE)) if denominator == "offline" else (),
        placement=draw(st.sampled_from(PLACEMENTS)),
        denominator=denominator,
        v_mean=draw(st.booleans()),
        keys=(lengths[0], lengths[-1]),
        kept=draw(SHARES),
        error=draw(st.none() | POSITIVE),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    found=st.dictionaries(st.text(max_size=9), skips() | thetas(), max_size=3),
    masks_only=st.booleans(),
)
def test_any_thresholds_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    found: dict[str, AttentionThresholds],
    masks_only: bool,
) -> None:
    folder = tmp_path_factory.getbasetemp() / "thresholds"
    model = torch.nn.Linear(4, 4)
    annotate_attention(model, found)
    save(model, folder, masks_only=masks_only)
    assert attention_thresholds(load(folder, torch.nn.Linear(4, 4))) == found


def test_loading_adds_to_the_thresholds_of_the_model(tmp_path: Path) -> None:
    model, target = zoo(), zoo()
    annotate_attention(model, {"layers.0": SKIP})
    save(model, tmp_path)
    annotate_attention(target, {"layers.0": THETA, "layers.1": THETA})
    found = attention_thresholds(load(tmp_path, target))
    assert found == {"layers.0": SKIP, "layers.1": THETA}


def test_a_file_without_thresholds_is_the_file_it_always_was(tmp_path: Path) -> None:
    save(zoo(), tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(file.metadata()) == {"format", KEY}
    assert attention_thresholds(load(tmp_path, zoo())) == {}


def test_a_failed_save_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo()
    annotate_attention(model, {"layers.0": SKIP})
    save(model, tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    annotate_attention(model, {"layers.0": replace(SKIP, prefill=(float("nan"), 1.0, 1.0))})
    with pytest.raises(CheckpointMismatch, match=r"layers\.0: prefill has an entry that is no fin"):
        save(model, tmp_path)
    annotate_attention(model, {"layers.0": SKIP})
    monkeypatch.setattr(module, "_MOST_TEXT", 100)
    with pytest.raises(CheckpointMismatch, match="more than 100 characters"):
        save(model, tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


HOSTILE: dict[str, tuple[str, Json, str]] = {
    "no heads": ("skip", {"prefill": []}, "prefill is not a list of 1 to 65536"),
    "many heads": ("skip", {"prefill": [1.0] * 65537}, "prefill is not a list of 1 to 65536"),
    "heads of another number": ("skip", {"decode": [1.0]}, "decode has 1 entries where 3 belong"),
    "factor NaN": ("skip", {"prefill": [1, 2, float("nan")]}, "no finite number"),
    "factor infinite": ("skip", {"decode": [1, 2, float("inf")]}, "no finite number"),
    "factor huge": ("skip", {"decode": [1, 2, 10**400]}, "no finite number"),
    "factor true": ("skip", {"decode": [1, 2, True]}, "no finite number"),
    "factor a text": ("skip", {"decode": "123"}, "decode is not a list"),
    "factor negative": ("skip", {"decode": [1, 2, -1e-9]}, "decode has an entry below 0"),
    "tile of three": ("skip", {"tile": [64, 64, 64]}, "tile has 3 entries where 2 belong"),
    "tile of 63": ("skip", {"tile": [64, 63]}, "tile is (64, 63)"),
    "tile a float": ("skip", {"tile": [64, 64.0]}, "tile has an entry that is no whole"),
    "order unknown": ("skip", {"order": "random"}, "order 'random' is not one of"),
    "order unhashable": ("skip", {"order": []}, "order [] is not one of"),
    "keys descending": ("skip", {"keys": [9, 8]}, "keys do not ascend"),
    "keys negative": ("skip", {"keys": [-1, 8]}, "no whole number from 0"),
    "keys huge": ("skip", {"keys": [1, 2**63]}, "no whole number from 0"),
    "skipped above 1": ("skip", {"skipped": [1.5, None]}, "skipped lies outside"),
    "lost mass below 0": ("skip", {"lost_mass": [None, -0.5]}, "lost_mass lies outside"),
    "error negative": ("skip", {"error": [None, -0.5]}, "error lies outside"),
    "one phase": ("skip", {"r2": [0.9]}, "r2 has 1 entries where 2 belong"),
    "r2 NaN": ("skip", {"r2": [0.9, float("nan")]}, "r2 has an entry that is no finite"),
    "unknown field": ("skip", {"code": "x"}, "missing or unknown fields"),
    "method unknown": ("skip", {"method": "blasst"}, "of no known method"),
    "method unhashable": ("skip", {"method": {}}, "of no known method"),
    "method of another": ("skip", {"method": "theta"}, "missing or unknown fields"),
    "k of 0": ("theta", {"k": 0}, "k has an entry that is no whole number from 1"),
    "no lengths": ("theta", {"lengths": []}, "lengths is not a list"),
    "lengths descending": ("theta", {"lengths": [65, 2048, 128]}, "lengths do not ascend"),
    "lengths more": ("theta", {"lengths": [65, 66, 67, 68]}, "theta has 3 entries where 4"),
    "theta ragged": ("theta", {"theta": [[1, 2, 3], [1, 2]]}, "theta has 2 entries where 3"),
    "theta infinite": ("theta", {"theta": [[1, 2, -float("inf")]] * 2}, "no finite number"),
    "theta flat": ("theta", {"theta": [1, 2, 3]}, "theta is not a list"),
    "lost of other heads": ("theta", {"lost": [[1, 2, 3]]}, "another number of heads"),
    "lost missing": ("theta", {"lost": []}, "another number of heads"),
    "lost negative": ("theta", {"lost": [[1, 2, -3]] * 2}, "lost has an entry below 0"),
    "placement": ("theta", {"placement": "before"}, "placement 'before' is not one of"),
    "denominator": ("theta", {"denominator": None}, "denominator None is not one of"),
    "v_mean a number": ("theta", {"v_mean": 1}, "v_mean is 1"),
    "kept above 1": ("theta", {"kept": 2}, "kept lies outside"),
}


def edited(folder: Path, text: str) -> None:
    """Writes a checkpoint whose thresholds are `text`."""
    path = folder / "model.safetensors"
    save(zoo(), folder)
    header, data = split(path)
    header["__metadata__"][THRESHOLDS_KEY] = text
    path.write_bytes(joined(header, data))


def assert_refused(folder: Path, says: str) -> None:
    model = zoo(seed=1)
    before = snapshot(model)
    with pytest.raises(CorruptCheckpoint) as caught:
        load(folder, model)
    assert says in str(caught.value)
    assert snapshot(model) == before
    assert attention_thresholds(model) == {}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_thresholds_are_refused(tmp_path: Path, case: str) -> None:
    kind, changes, says = HOSTILE[case]
    text = module.thresholds_to_json({"skip": SKIP, "theta": THETA})
    table = json.loads(text)
    table["attention"][kind].update(changes)
    edited(tmp_path, json.dumps(table))
    assert_refused(tmp_path, says)
    edited(tmp_path, text)
    assert attention_thresholds(load(tmp_path, zoo())) == {"skip": SKIP, "theta": THETA}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"version": ' + "9" * 5000 + "}", "not JSON"),
        ("null", "not of version 1"),
        ('{"version": 2, "attention": {}}', "not of version 1"),
        ('{"version": 1}', "missing or unknown fields"),
        ('{"version": 1, "attention": []}', "missing or unknown fields"),
        ('{"version": 1, "attention": {"a": 3}}', "of no known method"),
        ('{"version": 1, "attention": {"a": 3, "a": 3}}', "one name twice"),
        (" " * (2**25 + 1), "more than 33554432 characters"),
    ],
)
def test_what_is_no_table_of_thresholds_is_refused(tmp_path: Path, text: str, says: str) -> None:
    edited(tmp_path, text)
    assert_refused(tmp_path, says)
