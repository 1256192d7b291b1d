"""Generated C++ linears by AMX tiles: bfloat16, and int8 by int8."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparsefx.codegen.cpp import CppLinear, emit, isa
from sparsefx.packing import Packing
from tests.golden import assert_golden
from tests.test_cpp_kernels import Case
from tests.test_cpp_quantised import Case as Quantised

BF16, FLOAT, HALF = torch.bfloat16, torch.float32, torch.float16
needs_tiles = pytest.mark.skipif(
    not isa.AMX.present(), reason="this CPU has no AMX, or its use was refused"
)
# Below and above where tiles begin, all fillings of a tile of x, and several tiles.
ROWS = [*range(1, 41), 300]
DYNAMIC = [
    Quantised(Packing("nm", n=2, m=4, values="int8_dynamic"), FLOAT),
    Quantised(Packing("nm", n=1, m=4, values="int8_dynamic"), HALF),
    Quantised(Packing("nm", n=4, m=8, values="int8_dynamic"), BF16),
    Quantised(Packing("bitmap", values="int8_dynamic"), FLOAT, 0.5, 203, "relu"),
    Quantised(Packing("bitmap", values="int8_dynamic"), FLOAT, 0.1, 1037),
]
WIDENED = [
    Quantised(Packing("nm", n=2, m=4, values="int8"), BF16),
    Quantised(Packing("bitmap", values="int4"), BF16, 0.3, 203),
]


def bf16_case(
    pattern: tuple[int, int] | float, out: int, width: int, bias: bool = False, epilogue: str = ""
) -> Case:
    return Case(pattern, BF16, out, width, "amx", bias, epilogue)


@needs_tiles
@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8), 0.5, 0.9], ids=str)
def test_every_row_count(pattern: tuple[int, int] | float) -> None:
    case = bf16_case(pattern, 37, 328 if isinstance(pattern, tuple) else 331)
    assert "for amx" in case.lowering.text
    for rows in ROWS:
        case.check(case.tensor(rows, case.width))


@needs_tiles
@pytest.mark.parametrize("case", [*DYNAMIC, *WIDENED], ids=str)
def test_every_row_count_of_codes(case: Quantised) -> None:
    tensors = case.tensors(out=37)
    low = CppLinear(case.packing.layout, "amx").lower(case.spec(37), tensors)
    assert "for amx" in low.text
    for rows in ROWS:
        x = case.x(rows)
        got, want = low.run(x), case.meaning(x, tensors)
        bound = {FLOAT: 2e-6, BF16: 8e-3, HALF: 1e-3}[case.dtype] * want.abs().max() + 1e-5
        assert (got.double() - want).abs().max() <= bound, rows


@needs_tiles
@pytest.mark.parametrize("out", [1, 2, 15, 16, 17, 48])
@pytest.mark.parametrize("width", [1, 31, 32, 33, 256, 257, 511, 513])
def test_odd_sizes(out: int, width: int) -> None:
    case = bf16_case(0.4, out, width)
    for rows in (5, 19):
        case.check(case.tensor(rows, width))


@needs_tiles
def test_rows_that_no_cache_holds_at_once() -> None:
    case = bf16_case((2, 4), 20, 16384 + 64, True)
    for rows in (64, 130):
        case.check(case.tensor(rows, case.width))


@needs_tiles
@pytest.mark.parametrize(
    "epilogue", ["relu", "silu;mul 0;scale 1e-05;add 1", "gelu_tanh;add 0", "gate_silu;add 0"]
)
@pytest.mark.parametrize("bias", [False, True])
def test_epilogues(epilogue: str, bias: bool) -> None:
    case = bf16_case((2, 4), 38, 72, bias, epilogue)
    for rows in (4, 18, 70):
        case.check(case.tensor(rows, 72))


@needs_tiles
def test_gates_of_codes() -> None:
    case = replace(DYNAMIC[0], epilogue="gate_silu")
    tensors = case.tensors(out=38)
    low = CppLinear("nm", "amx").lower(case.spec(38), tensors)
    x = case.x(20)
    torch.testing.assert_close(low.run(x).double(), case.meaning(x, tensors), rtol=1e-5, atol=1e-4)


@needs_tiles
def test_nan_and_infinity_stay_in_their_row() -> None:
    plain, coded = bf16_case((2, 4), 20, 72), DYNAMIC[0]
    tensors = coded.tensors(out=20)
    low = CppLinear("nm", "amx").lower(coded.spec(20), tensors)
    runs: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
        (lambda x: plain.run(x, []), plain.tensor(18, 72)),
        (low.run, coded.x(18)),
    ]
    for run, x in runs:
        want = run(x)
        x[3], x[17, 5] = float("nan"), float("inf")
        got = run(x)
        assert got[3].isnan().all()
        assert not got[17].isfinite().all()
        rest = [row for row in range(18) if row not in (3, 17)]
        assert torch.equal(got[rest], want[rest])


@needs_tiles
def test_numbers_below_the_smallest_normal_one_count_as_zero() -> None:
    """As in AVX-512's products of bfloat16."""
    case = bf16_case((2, 4), 16, 64)
    tiny = torch.finfo(BF16).smallest_normal / 4
    x = torch.full((8, 64), tiny, dtype=BF16)
    assert not case.run(x, []).any()
    case.lowering.packed[0].fill_(tiny)
    assert not case.run(torch.ones(8, 64, dtype=BF16), []).any()


@needs_tiles
@pytest.mark.parametrize("rows", [5, 150])
def test_threads_do_not_change_a_bit(rows: int) -> None:
    case = bf16_case(0.5, 300, 512)
    x = case.tensor(rows, 512)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = case.run(x, [])
        torch.set_num_threads(2)
        two = case.run(x, [])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, two), case


@needs_tiles
def test_tiles_of_torch_work_on() -> None:
    case, dense = bf16_case((2, 4), 64, 64), torch.nn.Linear(64, 64, dtype=BF16)
    x = case.tensor(32, 64)
    with torch.inference_mode():
        before = dense(x)
        case.check(x)
        assert torch.equal(dense(x), before)


# Forbids what asks for tiles, then runs a library that was built where they were allowed.
_REFUSED = """
import ctypes, struct, sys, torch
code = ((0x20, 0, 0, 0), (0x15, 0, 3, 158), (0x20, 0, 0, 16), (0x15, 0, 1, 0x1023),
        (6, 0, 0, 0x50001), (6, 0, 0, 0x7FFF0000))  # arch_prctl(0x1023): EPERM
filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code), ctypes.addressof(filters)))
prctl = ctypes.CDLL(None).prctl
prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
assert prctl(38, 1, 0, 0, 0) == 0 and prctl(22, 2, ctypes.addressof(program), 0, 0) == 0
from sparsefx.codegen.cpp import isa
assert not isa.AMX.present() and isa.best(isa.LINEAR_ISAS) is isa.AVX512_FP16
from tests.test_cpp_tiles import *
case = bf16_case((2, 4), 37, 328)
"""


@needs_tiles
def test_where_the_system_refuses() -> None:
    lower = "isa._may_use_tiles = lambda: True\n"  # what a compiled model names was built before
    check = "case.check(case.tensor(40, case.width))\n"
    text = _REFUSED.replace("case =", f"{lower}case =") + check
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_tiles_serve_what_they_multiply() -> None:
    bf16, coded = Case((2, 4), BF16, 4, 32, "portable").spec(), DYNAMIC[0].spec()
    for spec in (bf16, coded, replace(bf16, values="int4"), replace(coded, dtype=BF16)):
        assert isa.AMX.serving(spec) is isa.AMX
    grouped = replace(coded, group=64)
    listed = replace(bf16, layout="bitmap", n=0, m=0, density=0.02)
    blocks = replace(bf16, layout="block", n=0, m=0, block=(16, 16))
    others = (replace(bf16, dtype=FLOAT), replace(bf16, dtype=HALF), replace(coded, values="int8"))
    for spec in (grouped, listed, blocks, *others):
        assert isa.AMX.serving(spec) is isa.AVX512_FP16


def test_declines_tiles_that_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Case((2, 4), BF16, 4, 32, "portable").spec()
    monkeypatch.setattr(isa, "_cpu_flags", lambda: isa.AMX.needs)
    monkeypatch.setattr(isa, "_may_use_tiles", lambda: False)
    assert CppLinear("nm", "amx").accepts(spec) == "this CPU has no amx"
    assert isa.best(isa.LINEAR_ISAS) is isa.AVX512_FP16


def test_text_of_a_kernel_by_tiles() -> None:
    assert_golden("cpp_nm_linear_2_4_int8_dynamic_amx.cpp", emit.source(DYNAMIC[0].spec(), isa.AMX))
