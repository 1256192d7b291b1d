"""Kernels are compiled in processes of their own, for a device that need not be here."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsefx.codegen.triton import library, precompile
from sparsefx.codegen.triton.precompile import ENDED, Outcome, Pool, Request, _Worker
from sparsefx.target import LinearSpec, Lowering


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Cache folders of its own for each test, and processes that compile."""
    monkeypatch.setenv("SPARSEFX_CACHE", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    return tmp_path


GOOD = Request("block 16x16 float16 linear", 4, 4096, 64)
FORGED = Request("exec 16x16 float16 linear", 4, 4096, 64)


SPEC = LinearSpec(
    layout="block",
    out_features=4096,
    in_features=64,
    n=0,
    m=0,
    density=0.2,
    dtype=torch.float16,
    has_bias=False,
    epilogue="",
    rows=4,
    rows_vary=False,
    block=(16, 16),
)


@pytest.fixture
def pool() -> Iterator[Pool]:
    """One process at most."""
    pool = Pool(1)
    yield pool
    pool.close()


def lowering(handle: str) -> Lowering:
    return Lowering(torch.ops.sparsefx_triton.linear.default, (), handle, 4096, "", "")


def test_fills_the_cache_and_reports_each(cache: Path, pool: Pool) -> None:
    found = pool.compile((GOOD, FORGED, GOOD), "sm_90")
    assert found[GOOD].error == "" and found[GOOD].spills == 0 and found[GOOD].shared > 0
    assert found[FORGED].error.startswith("InvalidHandle")
    assert list((cache / "compiled").rglob("kernel.cubin"))


def test_one_process_serves_one_call_after_the_other_and_then_ends(
    monkeypatch: pytest.MonkeyPatch, pool: Pool
) -> None:
    started: list[_Worker] = []
    start = _Worker.__init__
    monkeypatch.setattr(_Worker, "__init__", lambda self: (start(self), started.append(self))[0])
    assert [pool.compile((GOOD,), arch)[GOOD].error for arch in ("sm_90", "sm_86")] == ["", ""]
    (worker,) = started
    assert worker.is_running()
    pool.close()
    assert not worker.is_running()


def test_processes_end_when_there_is_no_work(monkeypatch: pytest.MonkeyPatch, pool: Pool) -> None:
    monkeypatch.setattr(precompile, "IDLE", 0.01)
    pool.compile((GOOD,), "sm_90")
    assert pool.closing is not None
    pool.closing.join(20)
    assert not pool.waiting()


@pytest.mark.parametrize("program", ["/bin/true", "/bin/echo", "/nowhere"])
def test_a_process_that_never_answers_says_nothing_of_a_kernel(
    monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    monkeypatch.setattr(precompile.sys, "executable", program)
    found = Pool(2).compile((GOOD, FORGED), "sm_90")
    assert all(each.error and not each.fault for each in found.values())


def test_a_process_that_ends_on_a_kernel_condemns_it(
    monkeypatch: pytest.MonkeyPatch, pool: Pool
) -> None:
    pool.compile((GOOD,), "sm_90")
    ask = _Worker.ask

    def dies(self: _Worker, request: Request, arch: str) -> Outcome | None:
        self._process.kill()
        self._process.wait()
        return ask(self, request, arch)

    monkeypatch.setattr(_Worker, "ask", dies)
    assert pool.compile((FORGED,), "sm_90")[FORGED] == Outcome(ENDED)


def test_a_process_that_ended_while_it_waited_is_replaced(
    monkeypatch: pytest.MonkeyPatch, pool: Pool
) -> None:
    started: list[_Worker] = []
    start = _Worker.__init__
    monkeypatch.setattr(_Worker, "__init__", lambda self: (start(self), started.append(self))[0])
    pool.compile((GOOD,), "sm_90")
    started[0]._process.kill()
    started[0]._process.wait()
    assert pool.compile((GOOD,), "sm_90")[GOOD].error == ""
    assert len(started) == 2


def test_what_lies_in_the_working_folder_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool: Pool
) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise SystemExit")
    monkeypatch.chdir(tmp_path)
    assert pool.compile((GOOD,), "sm_90")[GOOD].error == ""


def test_a_cache_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, pool: Pool
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/proc/sparsefx")
    outcome = pool.compile((GOOD,), "sm_90")[GOOD]
    assert "/proc/sparsefx" in outcome.error and not outcome.fault


def test_a_forked_process_leaves_the_processes_alone(pool: Pool) -> None:
    pool.compile((GOOD,), "sm_90")
    waiting = pool._idle
    pool.forget()
    assert not pool.waiting() and waiting.qsize() == 1
    pool._idle = waiting


def test_nothing_to_do() -> None:
    assert Pool().compile((), "sm_90") == {}


def test_spilling_kernels_are_refused_and_those_of_other_operators_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outcomes = {"spills": Outcome("", spills=8), "crashes": Outcome(ENDED), "odd": Outcome("no")}
    monkeypatch.setattr(precompile, "architecture", lambda: "sm_90")
    monkeypatch.setattr(
        precompile.POOL,
        "compile",
        lambda asked, arch: {each: outcomes.get(each.handle, Outcome("")) for each in asked},
    )
    other = replace(lowering("spills"), op=torch.ops.sparsefx_rows.linear.default)
    asked = [*map(lowering, ("fine", "spills", "crashes", "odd")), other]
    said = precompile.inspect([(SPEC, each) for each in asked])
    assert "spill" in said[1] and said[2] == ENDED
    assert [said[at] for at in (0, 3, 4)] == ["", "", ""]  # "odd" says so when it is launched


def test_nothing_is_refused_where_no_gpu_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompile, "architecture", lambda: None)
    assert precompile.inspect([(SPEC, lowering("exec"))]) == [""]


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
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(library, "interpreting", lambda: False)
    assert precompile.architecture() == "sm_86"
    monkeypatch.setattr(library, "interpreting", lambda: True)
    assert precompile.architecture() is None
