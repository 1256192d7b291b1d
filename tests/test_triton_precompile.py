"""Kernels are compiled in processes of their own, for a device that need not be here."""

from pathlib import Path

import pytest
import torch

from sparsefx.codegen.triton import precompile
from sparsefx.codegen.triton.precompile import Outcome, Request


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cache folders of its own for each test, and processes that compile."""
    monkeypatch.setenv("SPARSEFX_CACHE", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    return tmp_path


GOOD = Request("block 16x16 float16 linear", 4, 4096, 64)
FORGED = Request("exec 16x16 float16 linear", 4, 4096, 64)


def test_fills_the_cache_and_reports_each(cache: Path) -> None:
    seen: list[tuple[int, int]] = []
    progress = lambda done, of: seen.append((done, of))  # noqa: E731
    found = precompile.precompile((GOOD, FORGED, GOOD), "sm_90", 1, progress)
    assert found[GOOD].error == "" and found[GOOD].spills == 0 and found[GOOD].shared > 0
    assert found[FORGED].error.startswith("InvalidHandle")
    assert seen == [(1, 2), (2, 2)]
    assert list((cache / "compiled").rglob("kernel.cubin"))


def test_a_process_that_ends_is_an_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompile.sys, "executable", "/bin/true")
    found = precompile.precompile((GOOD, FORGED), "sm_90", 2)
    assert set(found.values()) == {Outcome("the compiler ended its process")}


def test_nothing_to_do() -> None:
    assert precompile.precompile((), "sm_90") == {}


@pytest.mark.parametrize("out", [1, 96, 4096, 1000, 1001, 14336, 129, 1024 + 17])
def test_fewer_rows_are_specialised_alike(out: int) -> None:
    small = precompile._small(out)
    assert 0 < small <= max(130, 0) and small <= out
    assert (small % 16 == 0) == (out % 16 == 0) and (small == 1) == (out == 1)
    assert out <= 128 or small % 2 == out % 2  # gates need pairs


def test_names_the_device_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert precompile.architecture() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert precompile.architecture() == "sm_90"
