"""The mma.sp kernels compile for real GPUs: the layout they take for granted, nothing but mma.sp.

The order of fragments itself was never seen on hardware: here it follows the PTX ISA
(tests/ptx_machine.py); `benchmarks/fragment_order.py` asks the hardware where there is one.
"""

import pytest

from tests.aot_client import Worker

slow = pytest.mark.slow
ARCHITECTURES = [
    *("sm_80", "sm_90"),
    *(pytest.param(a, marks=slow) for a in ("sm_89", "sm_100")),
]
LOADS = {"2:4": 8, "1:4": 4, "2:4 int8": 4, "2:4 int4 group 128": 2}  # of A, 128 bits, a block


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("pattern", "settings", "rows", "slabs", "tiles"),
    [
        ("2:4", "deep=16", 8, 1, 1),
        ("2:4", "slabs=2 tall=4 deep=2 direct=0", 64, 2, 8),
        ("1:4", "deep=8", 16, 1, 2),
        ("2:4 int8", "deep=8", 1, 1, 1),
        ("2:4 int4 group 128", "deep=8", 8, 1, 1),
    ],
)
def test_resources(
    worker: Worker, pattern: str, settings: str, rows: int, slabs: int, tiles: int, arch: str
) -> None:
    handle = f"mma_sp {pattern} bfloat16 linear {settings} -> bias -> silu"
    found = worker.compile(handle, arch, rows, out=4096, width=4096)
    assert found["spills"] == 0 and found["stack"] == 0 and found["in_lanes"], found
    counts = found["instructions"]
    assert isinstance(counts, dict) and "local" not in counts and "mma" not in counts, found
    assert counts["mma_sp"] == 8 * slabs * tiles
    # x, A, metadata and scales by 128 bits, and no step through shared memory in the loop
    wide = 8 * tiles + slabs * (LOADS[pattern] + 1 + ("int" in pattern))
    assert counts["load128"] == wide
    looped = found["looped"]
    assert isinstance(looped, dict) and looped["load"] == wide and "barrier" not in looped, found


@pytest.mark.parametrize("kernel", ["fragments_of", "reduce"])
def test_the_launches_beside_it(worker: Worker, kernel: str) -> None:
    handle = "mma_sp 2:4 float16 linear slabs=2 tall=2 deep=2 split=2 direct=0 -> gate_silu"
    found = worker.compile(handle, "sm_90", 64, kernel=kernel)
    assert found["spills"] == 0 and found["stack"] == 0 and found["in_lanes"], found


@pytest.mark.parametrize("direct", [0, 1])
def test_ragged_sizes(worker: Worker, direct: int) -> None:
    handle = f"mma_sp 1:4 float16 linear deep=4 direct={direct}"
    found = worker.compile(handle, "sm_90", 7, out=1001, width=1000)
    assert found["spills"] == 0 and found["in_lanes"], found
