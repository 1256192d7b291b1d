"""Tuning results as a file: what was measured once is not measured again."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sparsefx
from sparsefx import debug, guard, timing, tuned
from sparsefx.api.target_table import targets
from sparsefx.errors import InvalidTuning, UnknownOption
from sparsefx.target import LinearSpec, Lowering
from sparsefx.tuned import Tuned
from tests.guard_kernels import CALLS, SPEC, layer, lowering
from tests.test_api import two

TEXT = "int run() { return 0; }"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.01)
    CALLS.clear()


def measure(cache: Path, text: str = TEXT, results: Tuned | None = None) -> guard.Verdict:
    weight, bias = layer()
    made = lowering("right", weight, text)
    return guard.measure(SPEC, weight, bias, made, device="cpu", cache=cache, tuned=results)


def written(folder: Path) -> tuple[Path, guard.Verdict]:
    """A file of one verdict."""
    verdict, path = measure(folder / "first"), folder / "tuned.json"
    tuned.write(path, guard.known(folder / "first"))
    CALLS.clear()
    return path, verdict


def test_what_the_file_answers_is_not_measured(tmp_path: Path) -> None:
    path, verdict = written(tmp_path)
    results = Tuned.read(path)
    assert measure(tmp_path / "other", results=results) == verdict
    assert measure(tmp_path / "other", results=results) == verdict
    assert not CALLS
    assert str(results) == "tuned.json: 1 of 1 verdicts used"


def test_the_file_goes_before_what_was_measured_here(tmp_path: Path) -> None:
    path, verdict = written(tmp_path)
    data = json.loads(path.read_text())
    data["entries"][0]["value"]["sparse_us"] = 1e-3
    path.write_text(json.dumps(data))
    measure(tmp_path / "here")
    shipped = measure(tmp_path / "here", results=Tuned.read(path))
    assert (shipped.sparse_us, shipped.dense_us) == (1e-3, verdict.dense_us)


def test_it_holds_no_kernel_text(tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    assert TEXT not in path.read_text()
    assert path.stat().st_size < 2000


STRANGE: dict[str, tuple[dict[str, str], str]] = {
    "device": ({"device": "another CPU"}, "another device"),
    "torch": ({"torch": "1.0"}, "another device, or with other versions"),
    "kernel": ({"kernel": "0" * 32}, "its kernels are not those"),
    "spec": ({"spec": "LinearSpec(...)"}, "no such layer"),
}


@pytest.mark.parametrize("what", STRANGE)
def test_other_entries_are_ignored_with_the_reason(tmp_path: Path, what: str) -> None:
    path, _ = written(tmp_path)
    change, reason = STRANGE[what]
    data = json.loads(path.read_text())
    data["entries"][0]["key"].update(change)
    path.write_text(json.dumps(data))
    results = Tuned.read(path)
    measure(tmp_path / "other", results=results)
    assert CALLS["right"] > 3
    assert reason in str(results) and "0 of 1 verdicts used; measured here: 1" in str(results)


DAMAGE: dict[str, Callable[[str], str]] = {
    "truncated": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "list": lambda text: "[1]",
    "deep": lambda text: "[" * 100_000,
    "another version": lambda text: text.replace('"version": 1', '"version": 2'),
    "no entries": lambda text: text.replace('"entries"', '"entrails"'),
    "an entry that is none": lambda text: text.replace('"entries": [', '"entries": [3, '),
    "a key of numbers": lambda text: text.replace('"threads": "', '"threads": 3, "x": "'),
    "a value that is none": lambda text: text.replace('"value": {', '"value": 1, "other": {'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_one_typed_error(tmp_path: Path, damage: str) -> None:
    path, _ = written(tmp_path)
    changed = DAMAGE[damage](path.read_text())
    assert changed != path.read_text()
    path.write_text(changed)
    with pytest.raises(InvalidTuning, match="tuned.json"):
        Tuned.read(path)


def test_numbers_that_are_none_are_measured_again(tmp_path: Path) -> None:
    path, _ = written(tmp_path)
    path.write_text(path.read_text().replace('"dense_us": ', '"dense_us": -'))
    assert measure(tmp_path / "other", results=Tuned.read(path)).dense_us > 0
    assert CALLS["right"] > 3


@torch.no_grad()
def test_a_compiled_model_says_what_it_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setenv("SPARSEFX_CACHE", str(tmp_path / "first"))
    sparsefx.compile(two())(torch.randn(2, 32))
    path = tmp_path / "tuned.json"
    verdicts = guard.known(debug.settings().cache)
    assert verdicts
    tuned.write(path, verdicts)
    monkeypatch.setenv("SPARSEFX_CACHE", str(tmp_path / "second"))
    monkeypatch.setattr(guard, "_measured", lambda *_: pytest.fail("measured"))
    torch._dynamo.reset()
    fast = sparsefx.compile(two(), tuned=path)
    fast(torch.randn(2, 32))
    said = sparsefx.explain(fast).facts["tuning results"]
    assert said == f"tuned.json: {len(verdicts)} of {len(verdicts)} verdicts used"


def test_bad_options_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(UnknownOption, match="tuned"):
        sparsefx.compile(two(), tuned=3)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        sparsefx.compile(two(), tuned=tmp_path / "absent.json")


def test_another_question_is_another_entry(tmp_path: Path) -> None:
    weight, bias = layer()
    made = lowering("right", weight)
    for rows in (3, 5):
        spec = replace(SPEC, rows=rows)
        guard.measure(spec, weight, bias, made, device="cpu", cache=tmp_path / "both")
    tuned.write(tmp_path / "t.json", guard.known(tmp_path / "both"))
    assert len(Tuned.read(tmp_path / "t.json").entries) == 2


def test_it_is_known_whether_a_verdict_is_there(tmp_path: Path) -> None:
    weight, _ = layer()
    path, _ = written(tmp_path)

    def answered(cache: str, text: str = TEXT, results: Tuned | None = None) -> bool:
        made, folder = lowering("right", weight, text), tmp_path / cache
        return guard.is_answered(SPEC, made, device="cpu", cache=folder, tuned=results)

    assert answered("first") and not answered("other") and not answered("first", "another kernel")
    assert answered("other", results=Tuned.read(path))
    assert not CALLS


@torch.no_grad()
def test_kernels_are_inspected_before_their_first_timing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSEFX_CACHE", str(tmp_path))
    seen: list[str] = []

    def inspect(asked: Sequence[tuple[LinearSpec, Lowering]]) -> list[str]:
        seen.extend(lowering.handle for _, lowering in asked)
        return ["it spills"] * len(asked)

    target = replace(targets()["cpu"], inspect=inspect)
    fast = sparsefx.compile(two(), target=target)
    fast(torch.randn(2, 32))
    rows = [row for row in sparsefx.explain(fast).rows if row.pattern]
    assert seen and rows and all("it spills" in row.reason for row in rows)

    sparsefx.compile(two())(torch.randn(2, 32))
    seen.clear()
    again = sparsefx.compile(two(), target=target)
    again(torch.randn(2, 32))
    assert not seen, "what has been timed is not inspected again"
