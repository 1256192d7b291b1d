"""A cache that cannot be used costs time, never an answer."""

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from sparsefx import diskcache, timing
from sparsefx.codegen.cpp import build
from sparsefx.report import Row

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.01)
    torch._dynamo.reset()


def model() -> nn.Module:
    torch.manual_seed(0)
    recipe = sparsefx.Recipe({"*": sparsefx.NM(2, 4)})
    return sparsefx.sparsify(nn.Sequential(nn.Linear(64, 64)), recipe, progress=False).eval()


@torch.no_grad()
def compiled_row(x: Tensor) -> Row:
    """The row of a small model, whose compiled numbers are those of the dense one."""
    dense = model()
    fast = sparsefx.compile(dense)
    torch.testing.assert_close(fast(x), dense(x), atol=1e-4, rtol=1e-4)
    report = sparsefx.explain(fast)
    assert report.check() == []
    (row,) = report.rows
    return row


def is_judged(row: Row) -> bool:
    """Whether a kernel was built and timed, as with a cache that works."""
    return row.how == "measured" and (bool(row.kernel) or "faster than dense" in row.reason)


def a_file(folder: Path) -> Path:
    path = folder / "file"
    path.write_text("no folder")
    return path


TUNE = """
import sys, torch
import sparsefx
from sparsefx import timing
from tests.test_cache_trouble import compiled_row, is_judged
timing.SECONDS = 0.01
x = torch.randn(2, 64)
print("ready", flush=True)
sys.stdin.readline()
row = compiled_row(x)
assert is_judged(row), row
"""


def test_two_processes_that_tune_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both meet an empty cache, build the same kernels and leave one whole verdict on each."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("SPARSEFX_CACHE", str(cache))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", TUNE], cwd=ROOT, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    assert [each.stdout.readline() for each in both] == ["ready\n"] * 2
    for each in both:
        each.stdin.write("go\n")
        each.stdin.flush()
    assert [each.communicate(timeout=300) and each.returncode for each in both] == [0, 0]
    verdicts = {path: json.loads(path.read_text()) for path in (cache / "timings").iterdir()}
    assert verdicts and all(path.suffix == ".json" for path in verdicts)
    before = {path: path.stat().st_mtime_ns for path in verdicts}
    assert is_judged(compiled_row(torch.randn(2, 64)))  # a third finds what they left
    assert {path: path.stat().st_mtime_ns for path in (cache / "timings").iterdir()} == before


UNWRITABLE: dict[str, Callable[[Path], Path]] = {
    "a file stands there": a_file,
    "the kernel lets nobody write": lambda folder: Path("/proc/sparsefx"),
}


@pytest.mark.parametrize("what", UNWRITABLE)
def test_a_folder_that_cannot_be_written(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSEFX_CACHE", str(UNWRITABLE[what](tmp_path)))
    row = compiled_row(torch.randn(2, 64))
    assert is_judged(row), row


def full(*args: object) -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("everywhere", [False, True])
def test_a_full_disk(everywhere: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEFX_CACHE", str(tmp_path))
    monkeypatch.setattr(diskcache, "write_atomically", full)
    private = build._private_folder()
    write = build.write_atomically

    def into_the_private_folder(path: Path, data: bytes) -> None:
        if everywhere or private not in path.parents:
            full()
        write(path, data)

    monkeypatch.setattr(build, "write_atomically", into_the_private_folder)
    monkeypatch.setattr(build, "_found", lambda name: None)  # nothing of earlier tests
    row = compiled_row(torch.randn(2, 64))
    if everywhere:
        assert not row.kernel and "No space left on device" in row.reason
    else:
        assert is_judged(row), row
    assert list(tmp_path.rglob("*.json")) == []


def test_entries_of_another_version_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another torch measured is left alone, and found again for this one."""
    monkeypatch.setenv("SPARSEFX_CACHE", str(tmp_path / "first"))
    x = torch.randn(2, 64)
    compiled_row(x)
    for path in (tmp_path / "first" / "timings").iterdir():
        entry = json.loads(path.read_bytes())
        entry["key"]["torch"] = "1.0"
        entry["value"]["dense_us"] = 1e12
        copy = tmp_path / "second" / "timings" / path.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(json.dumps(entry))
    torch._dynamo.reset()
    monkeypatch.setenv("SPARSEFX_CACHE", str(tmp_path / "second"))
    row = compiled_row(x)
    assert is_judged(row)
    assert row.dense_us is not None and row.dense_us < 1e11
