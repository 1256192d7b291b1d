"""The decode kernels compile for real GPUs without spilling, and their loads of K and V overlap."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.aot_client import Worker

MATRIX = {"sm_80": "mma", "sm_89": "mma", "sm_90": "mma", "sm_100": "mma", "gfx942": "mfma"}
SHARED = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB of a program
slow = pytest.mark.slow
EVERYWHERE = [
    *("sm_80", "sm_90", "gfx942"),
    *(pytest.param(arch, marks=slow) for arch in ("sm_89", "sm_100")),
]
SKIP = "decode_skip bfloat16 dim {} group 4 tile 128x64 mask none order=sink_diagonal"
THETA = (
    "theta_decode bfloat16 dim {} group 4 tile 0x0 mask {} placement={} denominator={} v_mean={}"
)
HANDLES = (
    SKIP.format(64),
    SKIP.format(128),
    THETA.format(128, "none", "pre", "exact", 0),
)
MORE = (
    "decode_skip float16 dim 80 group 64 tile 128x16 mask bool windowed order=ascending",
    "decode_skip bfloat16 dim 128 group 32 tile 128x128 mask float order=sink_diagonal",
    "decode_skip bfloat16 dim 256 group 16 tile 64x32 mask none order=sink_diagonal",
    "decode_skip float32 dim 128 group 4 tile 64x64 mask none order=sink_diagonal",
    THETA.format(64, "bool", "pre", "offline", 1),
    THETA.format(128, "float", "post", "none", 1),
    THETA.format(64, "none", "pre", "exp_threshold", 0),
)
KERNELS = ("scores", "select", "values", "combine")
READS = ("scores", "values")


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """One process for all tests, with cache folders of its own."""
    folder: Path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEFX_CACHE", str(folder))
        patch.setenv("TRITON_CACHE_DIR", str(folder / "compiled"))
        with Worker() as started:
            yield started


def check(worker: Worker, handle: str, arch: str, kernel: str) -> dict[str, int]:
    """Compiles one launch of a step over 64k keys; returns its instruction counts."""
    job = {"handle": handle, "arch": arch, "batch": 8, "queries": 1, "keys": 65536}
    found = worker.ask(json.dumps({**job, "kernel": kernel}))
    assert found.pop("ok"), found
    assert found["spills"] == 0 and found["stack"] == 0, found
    assert isinstance(found["shared"], int) and found["shared"] <= SHARED[arch] * 1024
    counts = found["instructions"]
    assert isinstance(counts, dict) and "local" not in counts and counts["store"] > 0, found
    return counts


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("arch", EVERYWHERE)
@pytest.mark.parametrize("handle", HANDLES)
def test_no_spills_and_loads_overlap(worker: Worker, handle: str, arch: str, kernel: str) -> None:
    counts = check(worker, handle, arch, kernel)
    if kernel in READS:
        assert counts[MATRIX[arch]] > 0
        # a tile of K or V is read a step or more before its use
        assert arch == "gfx942" or counts["cp_async"] >= 8


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("arch", MATRIX)
@pytest.mark.parametrize("handle", MORE)
def test_more_variants(worker: Worker, handle: str, arch: str, kernel: str) -> None:
    check(worker, handle, arch, kernel)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_a_tile_that_is_skipped_costs_no_exp(worker: Worker, arch: str) -> None:
    """Scores and decisions have none; the loop over V sees kept tiles only and has no branch."""
    for kernel in ("scores", "select"):
        assert "exp2" not in check(worker, SKIP.format(128), arch, kernel)
    job = {"handle": SKIP.format(128), "arch": arch, "batch": 8, "queries": 1, "keys": 65536}
    found = worker.ask(json.dumps({**job, "kernel": "values"}))
    looped = found["looped"]
    assert isinstance(looped, dict) and looped["exp2"] > 0, found
    assert found["avoidable"] == {}
