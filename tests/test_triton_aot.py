"""Generated kernels compile for real GPUs without spilling and use their matrix instructions."""

import pytest

from sparsefx.codegen.triton import aot
from sparsefx.errors import KernelBuildFailed
from tests.aot_client import Worker
from tests.aot_expected import MATRIX

slow = pytest.mark.slow
EVERYWHERE = [
    *("sm_80", "sm_90", "gfx942"),
    *(pytest.param(a, marks=slow) for a in ("sm_89", "sm_100")),
]
HANDLES = (
    "nm 2:4 bfloat16 linear -> bias -> silu -> mul 0",
    "nm 3:16 float16 linear",
    "bitmap bfloat16 linear -> bias -> gelu",
)
MORE = (
    "nm 1:4 bfloat16 linear -> relu",
    "nm 4:8 float16 linear -> bias -> gelu_tanh -> add 0",
    "nm 2:8 bfloat16 linear",
    "nm 8:16 bfloat16 linear",
    "nm 12:16 bfloat16 linear",
    "bitmap float16 linear -> add 1 -> mul 0",
)


def check(worker: Worker, handle: str, arch: str, rows: int) -> dict[str, int]:
    """Compiles; asserts no spill and no stack; returns the instruction counts."""
    found = worker.compile(handle, arch, rows)
    assert found["spills"] == 0 and found["stack"] == 0, found
    counts = found["instructions"]
    assert isinstance(counts, dict) and "local" not in counts and counts["store"] > 0, found
    return counts


@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("arch", EVERYWHERE)
@pytest.mark.parametrize("handle", HANDLES)
def test_no_spills_and_tensor_cores(worker: Worker, handle: str, arch: str, rows: int) -> None:
    counts = check(worker, handle, arch, rows)
    assert counts[MATRIX[arch]] > 0
    assert arch == "gfx942" or counts["cp_async"] > 0  # loads overlap with the products


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 32, 100])
@pytest.mark.parametrize("arch", MATRIX)
@pytest.mark.parametrize("handle", MORE)
def test_more_patterns(worker: Worker, handle: str, arch: str, rows: int) -> None:
    assert check(worker, handle, arch, rows)[MATRIX[arch]] > 0


@pytest.mark.parametrize("arch", EVERYWHERE)
def test_float32_keeps_its_precision(worker: Worker, arch: str) -> None:
    """No tensor cores on NVIDIA: their float32 input is cut to ten bits (tf32)."""
    counts = check(worker, "nm 2:4 float32 linear -> relu", arch, 7)
    assert arch == "gfx942" or MATRIX[arch] not in counts


def test_ragged_sizes_compile_too(worker: Worker) -> None:
    found = worker.compile("nm 2:4 bfloat16 linear", "sm_90", rows=7, out=1001, width=1004)
    assert found["spills"] == 0


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("{", "JSONDecodeError"),
        ('{"handle": "x"}', "TypeError"),
        (
            '{"handle": "nm 2:4 float32 linear", "arch": "sm_20", "rows": 1, "out_features": 8,'
            ' "in_features": 8}',
            "UnknownOption",
        ),
    ],
)
def test_a_bad_job_gets_an_answer(worker: Worker, line: str, error: str) -> None:
    answer = worker.ask(line)
    assert not answer["ok"] and str(answer["error"]).startswith(error)


def test_refuses_inside_the_interpreter() -> None:
    with pytest.raises(KernelBuildFailed, match="TRITON_INTERPRET is set"):
        aot.compile_for("nm 2:4 float32 linear", "sm_90", 1, 64, 64)
