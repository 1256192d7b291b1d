"""The guard's memory: no question is timed twice, and no damaged or foreign answer is believed."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsefx import diskcache, timing
from sparsefx.target import LinearSpec
from tests.guard_kernels import CALLS, SPEC, measure


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.01)
    CALLS.clear()


def test_a_refusal_is_remembered_on_disk(tmp_path: Path) -> None:
    verdict = measure("wrong", tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    CALLS.clear()
    assert measure("wrong", tmp_path / "b") == verdict
    assert not CALLS


def test_each_question_is_timed_once(tmp_path: Path) -> None:
    first = measure("right", tmp_path)
    assert CALLS["right"] > 3
    CALLS.clear()
    near = replace(SPEC, density=0.5041)
    assert measure("right", tmp_path, near) is first, "densities that agree to two digits share"
    assert not CALLS


@pytest.mark.parametrize(
    "other",
    [replace(SPEC, rows=7), replace(SPEC, density=0.52), replace(SPEC, epilogue="relu")],
    ids=["rows", "density", "epilogue"],
)
def test_another_spec_is_another_question(tmp_path: Path, other: LinearSpec) -> None:
    measure("right", tmp_path)
    CALLS.clear()
    measure("right", tmp_path, other)
    assert CALLS["right"] > 3


def test_another_kernel_text_or_thread_count_is_another_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure("right", tmp_path)
    CALLS.clear()
    measure("right", tmp_path, text="other text")
    assert CALLS["right"] > 3
    CALLS.clear()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    measure("right", tmp_path)
    assert CALLS["right"] > 3


def test_another_process_reads_the_file(tmp_path: Path) -> None:
    first = measure("right", tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # a new folder has no memo, as a new process
    CALLS.clear()
    assert measure("right", tmp_path / "b") == first
    assert not CALLS


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda text: text[: len(text) // 2],
    "empty": lambda text: b"",
    "not json": lambda text: b"\x00\xff" * 50,
    "list": lambda text: b"[1, 2]",
    "deep": lambda text: b"[" * 100_000,
    "nan": lambda text: text.replace(b'"dense_us": ', b'"dense_us": NaN, "x": '),
    "negative": lambda text: text.replace(b'"sparse_us": ', b'"sparse_us": -'),
    "huge": lambda text: text.replace(
        b'"sparse_us": ', b'"sparse_us": 1' + b"0" * 500 + b', "x": '
    ),
    "text for a number": lambda text: text.replace(b'"dense_us": ', b'"dense_us": "1", "x": '),
    "no bound": lambda text: text.replace(b'"bound"', b'"bond"'),
    "no fault": lambda text: text.replace(b'"fault"', b'"fate"'),
    "other key": lambda text: text.replace(b"float32", b"float16"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_measured_again(tmp_path: Path, damage: str) -> None:
    measure("right", tmp_path / "a")
    (entry,) = (tmp_path / "a" / "timings").iterdir()
    copy = tmp_path / "b" / "timings" / entry.name
    copy.parent.mkdir(parents=True)
    whole = entry.read_bytes()
    copy.write_bytes(DAMAGE[damage](whole))
    assert copy.read_bytes() != whole
    CALLS.clear()
    verdict = measure("right", tmp_path / "b")
    assert CALLS["right"] > 3
    assert verdict.dense_us > 0
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    CALLS.clear()
    assert measure("right", tmp_path / "c") == verdict
    assert not CALLS, "the damaged entry was replaced by a good one"


def test_a_cache_that_cannot_be_written_costs_no_answer(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be")
    assert measure("right", blocked).dense_us > 0
    assert blocked.read_text() == "a file where the folder should be"


def test_no_half_written_file_is_left(tmp_path: Path) -> None:
    measure("right", tmp_path)
    assert [path.suffix for path in (tmp_path / "timings").iterdir()] == [".json"]


def test_diskcache_keeps_keys_apart(tmp_path: Path) -> None:
    diskcache.remember(tmp_path, {"a": "1"}, {"value": 1})
    diskcache.remember(tmp_path, {"a": "2"}, {"value": 2})
    assert diskcache.recall(tmp_path, {"a": "1"}) == {"value": 1}
    assert diskcache.recall(tmp_path, {"a": "3"}) is None
