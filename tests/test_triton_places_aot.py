"""Kernels by stored value compile for real GPUs: each lane loads whole vectors, and works alone."""

import pytest

from tests.aot_client import Worker

slow = pytest.mark.slow
NVIDIA = [*("sm_80", "sm_90"), *(pytest.param(a, marks=slow) for a in ("sm_89", "sm_100"))]


@pytest.mark.parametrize("arch", NVIDIA)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("rows", "wide"), [(1, 0), (4, 0), (8, 16), (16, 32)])
def test_a_gather_for_each_value_and_nothing_shared(
    worker: Worker, rows: int, wide: int, dtype: str, arch: str
) -> None:
    ahead = int(rows < 8)
    handle = f"places {dtype} linear lanes=16 warps=2 ahead={ahead} -> bias -> silu"
    found = worker.compile(handle, arch, rows, out=512, width=1024)
    assert found["spills"] == 0 and found["stack"] == 0, found
    counts, looped = found["instructions"], found["looped"]
    assert isinstance(counts, dict) and isinstance(looped, dict)
    # a vector: two loads of values and one of places, by 128 bits, and its base; then x
    assert counts["load128"] == wide + 3 * (1 + ahead)
    assert looped["load"] == max(wide, 16) + 4
    assert "barrier" not in looped


@pytest.mark.parametrize("arch", [*NVIDIA, "gfx942"])
@pytest.mark.parametrize(("rows", "kernel"), [(3, "ordered"), (3, "reduce"), (16, "kernel")])
def test_gates_and_the_launches_beside_it(
    worker: Worker, rows: int, kernel: str, arch: str
) -> None:
    handle = "places bfloat16 linear lanes=32 warps=4 split=2 -> gate_silu -> add 0"
    found = worker.compile(handle, arch, rows, out=1002, width=1001, kernel=kernel)
    assert found["spills"] == 0 and found["stack"] == 0, found
