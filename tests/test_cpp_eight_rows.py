"""3 to 8 rows of x, bitmaps that keep little: eight lanes, lists of places, a tile at a time."""

import pytest
import torch

from sparsefx.codegen.cpp import isa
from sparsefx.packing import Packing
from tests.test_cpp_kernels import Case
from tests.test_cpp_quantised import Case as Quantised

# Those that list places by compressing bytes; the others compute the same another way.
LISTING = [each.name for each in (isa.AVX512_FP16, isa.AVX512_VNNI) if each.present()]
ROWS = range(3, 9)
needs_lists = pytest.mark.skipif(not LISTING, reason="this CPU has no AVX-512 VBMI2")


@pytest.mark.parametrize("sparsity", [0.75, 0.9, 0.99])
@pytest.mark.parametrize("width", [7, 64, 203, 1024, 1104, 2500])
def test_every_width_and_number_of_rows(sparsity: float, width: int) -> None:
    case = Case(sparsity, torch.float32, 53, width, None)
    for rows in ROWS:
        case.check(case.tensor(rows, width))


@needs_lists
@pytest.mark.parametrize("isa_name", LISTING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits_and_more_rows_of_w_than_a_band(dtype: torch.dtype, isa_name: str) -> None:
    case = Case(0.93, dtype, 611, 1104, isa_name, bias=True)
    for rows in ROWS:
        case.check(case.tensor(rows, 1104))


@pytest.mark.parametrize("epilogue", ["gelu;mul 0;add 1", "gate_silu;add 0"])
def test_epilogues(epilogue: str) -> None:
    case = Case(0.92, torch.float32, 38, 1100, None, bias=True, epilogue=epilogue)
    for rows in ROWS:
        case.check(case.tensor(rows, 1100))


@pytest.mark.parametrize(("values", "group"), [("int8", 0), ("int8", 64), ("int4", 32)])
def test_codes_go_another_way(values: str, group: int) -> None:
    packing = Packing("bitmap", values=values, group=group)
    case = Quantised(packing, torch.float32, 0.08, 1100)
    tensors = case.tensors()
    low = case.lower(None, tensors)
    for rows in ROWS:
        x = case.x(rows)
        want = case.meaning(x, tensors)
        torch.testing.assert_close(low.run(x).double(), want, rtol=1e-5, atol=1e-5)


def test_rows_of_w_of_zeros_alone() -> None:
    case = Case(1.0, torch.float32, 40, 1100, None, bias=True)
    case.check(case.tensor(8, 1100))


@needs_lists
@pytest.mark.parametrize("isa_name", LISTING)
@pytest.mark.parametrize("rows", [3, 8])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_bad_in_columns_that_are_not_stored_stays_there(
    bad: float, rows: int, isa_name: str
) -> None:
    case = Case(0.93, torch.float32, 77, 1100, isa_name)
    x = case.tensor(rows, 1100)
    want = case.meaning(x, [])
    unread = (case.weight == 0).all(0) if case.out < 4 else case.weight[4:].eq(0).all(0)
    assert unread.any(), case
    x[:, unread] = bad
    got = case.run(x, [])
    torch.testing.assert_close(got[:, 4:].double(), want[:, 4:], rtol=1e-5, atol=1e-4)
    assert not got[:, 3].isfinite().any()  # the row that keeps all


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_weight_is_of_its_own_row(bad: float) -> None:
    case = Case(0.93, torch.float32, 77, 1100, None)
    x = case.tensor(8, 1100)
    want = case.meaning(x, [])
    starts = case.packed[2]
    case.packed[0][starts[20] : starts[21]] = bad
    got = case.run(x, [])
    assert not got[:, 20].isfinite().any()
    others = [row for row in range(77) if row != 20]
    torch.testing.assert_close(got[:, others].double(), want[:, others], rtol=1e-5, atol=1e-4)


def test_the_smallest_numbers_count() -> None:
    case = Case(0.93, torch.float32, 40, 300, None)
    x = case.tensor(8, 300) * 1e-40
    want = case.meaning(x, [])
    assert want.abs().max() > 0
    torch.testing.assert_close(case.run(x, []).double(), want, rtol=0, atol=1e-43)


def test_threads_do_not_change_a_bit() -> None:
    case = Case(0.9, torch.float32, 700, 2500, None)
    x = case.tensor(8, 2500)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = case.run(x, [])
        torch.set_num_threads(2)
        two = case.run(x, [])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, two), case
