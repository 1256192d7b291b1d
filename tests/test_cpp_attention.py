"""Generated C++ skip-softmax and block attention against their meaning in float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparsefx.codegen.cpp.attention import call
from sparsefx.codegen.cpp.attention.call import run_counted
from tests.cpp_attention_cases import ISAS, LENGTHS, SEEN, Case, replaced, strided, widened

CASES = [
    Case("skip_softmax"),
    Case("skip_softmax", tile=(16, 32), dim=7, order="ascending"),
    Case("skip_softmax", tile=(128, 64), dim=64, mask="bool", kv_heads=6),
    Case("skip_softmax", tile=(32, 16), dim=80, mask="float", kv_heads=1),
    Case("skip_softmax", dtype=torch.bfloat16, dim=128, mask="bool"),
    Case("skip_softmax", dtype=torch.float16, dim=20, mask="float", order="ascending"),
    Case("block"),
    Case("block", tile=(32, 16), dim=33, mask="bool", dtype=torch.bfloat16),
    Case("block", tile=(64, 128), dim=256, mask="float", kv_heads=1),
]
"""All for the best instruction set; every second one for the others, which share all but lanes."""
ON_EVERY_ISA = [replace(case, isa=name) for name in ISAS[1:] for case in CASES[1::2]]


@pytest.mark.parametrize("case", CASES + ON_EVERY_ISA, ids=str)
def test_result_and_computed_tiles(case: Case) -> None:
    for i, lengths in enumerate(LENGTHS * 2):
        case.check(*lengths, *SEEN[i % len(SEEN)])


@pytest.mark.parametrize("case", [CASES[0], CASES[6]], ids=str)
def test_tiles_are_really_left_out(case: Case) -> None:
    low = case.lower()
    given = case.arguments(512, 512, True, 0)
    _, counted = run_counted(low.op, *given, 0, 0, low.handle)
    assert 0 < int(counted.sum()) < 0.8 * 36 * 2 * case.heads


@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[6]], ids=str)
@pytest.mark.parametrize("queries", [1, 90])
def test_strides_are_read_as_they_are(case: Case, queries: int) -> None:
    given = case.arguments(queries, 200, True, 0)
    operands = (strided(x) for x in given[:3] if isinstance(x, Tensor))
    case.check_given((*operands, *given[3:]))
    transposed = (x.mT.contiguous().mT for x in given[:3] if isinstance(x, Tensor))
    case.check_given((*transposed, *given[3:]))


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("queries", [1, 90])
def test_masks_broadcast(kind: str, queries: int) -> None:
    case = Case("skip_softmax", mask=kind)
    given = case.arguments(queries, 200, False, 0)
    mask = given[3]
    assert isinstance(mask, Tensor)
    wide = mask.expand(2, case.heads, queries, 200)
    for shape in ((1, 1, 1, 200), (2, 1, 1, 200), (1, 6, queries, 1), (queries, 200), (200,)):
        part = wide
        for axis, size in enumerate((1,) * (4 - len(shape)) + shape):
            part = part.narrow(axis, 0, size)
        low = case.lower()
        changed = replaced(given, 3, part.reshape(shape))
        no_skips = replaced(replaced(changed, 4, torch.zeros(6)), 5, torch.zeros(6))
        case.check_given(no_skips)
        assert low.op(*changed, 0, 0, low.handle).isfinite().all()


def test_a_float_mask_of_another_type_is_not_rounded() -> None:
    case = Case("skip_softmax", dtype=torch.bfloat16, mask="float")
    given = case.arguments(70, 70, True, 0)
    bias = torch.linspace(0, 1, 70, dtype=torch.float64).expand(1, 1, 70, 70)
    no_skips = replaced(replaced(given, 4, torch.zeros(6)), 5, torch.zeros(6))
    case.check_given(replaced(no_skips, 3, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_expanded_float_mask_is_converted_once(dtype: torch.dtype) -> None:
    case = Case("skip_softmax", mask="float")
    given = case.arguments(70, 150, True, 0)
    bias = torch.linspace(0, 1, 70 * 150).view(1, 1, 70, 150).to(dtype)
    no_skips = replaced(replaced(given, 4, torch.zeros(6)), 5, torch.zeros(6))
    for mask in (bias.expand(2, 6, 70, 150), bias[..., :1].expand(2, 1, 70, 150), bias[0, 0]):
        case.check_given(replaced(no_skips, 3, mask))
        once = call._in_float32(mask)
        assert torch.equal(once, mask.float())
        assert once.untyped_storage().nbytes() <= 4 * bias.numel()


@pytest.mark.parametrize("isa_name", ISAS)
@pytest.mark.parametrize("queries", [1, 70])
def test_rows_that_see_nothing_are_zero(queries: int, isa_name: str) -> None:
    case = Case("skip_softmax", mask="bool", isa=isa_name)
    given = case.arguments(queries, 200, True, 0)
    mask = given[3]
    assert isinstance(mask, Tensor)
    mask[0] = False
    low = case.lower()
    got, counted = run_counted(low.op, *given, 0, 0, low.handle)
    assert not got[0].any() and not counted[0].any()
    assert got[1].any() and counted[1].any()


@pytest.mark.parametrize("queries", [1, 70])
def test_the_lowest_finite_mask_hides_but_does_not_overflow(queries: int) -> None:
    case = Case("skip_softmax", mask="float")
    given = case.arguments(queries, 130, False, 0)
    mask = torch.zeros(2, 1, queries, 130)
    mask[0], mask[1, ..., :70] = torch.finfo().min, torch.finfo().min
    case.check_given(replaced(given, 3, mask))


@pytest.mark.parametrize("isa_name", ISAS)
@pytest.mark.parametrize("method", ["skip_softmax", "block"])
@pytest.mark.parametrize("queries", [1, 70])
def test_nan_stays_where_dense_has_it(queries: int, method: str, isa_name: str) -> None:
    case = Case(method, isa=isa_name)
    given = case.arguments(queries, 200, True, 0)
    if method == "block":
        given = replaced(given, 4, torch.ones_like(given[4]))  # type: ignore[call-overload]
    q, k = given[0], given[1]
    assert isinstance(q, Tensor) and isinstance(k, Tensor)
    q[0, 1, queries // 2] = float("nan")
    k[1, 0, 150] = float("nan")
    low = case.lower()
    got, counted = run_counted(low.op, *given, 0, 0, low.handle)
    want = case.meaning(given)
    assert torch.equal(got.isnan(), want.isnan())
    assert got.isnan().any() and not got.isnan().all()
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5, equal_nan=True)
    assert torch.equal(counted, case.kept(given).sum(-1).int())


@pytest.mark.parametrize("isa_name", ISAS)
@pytest.mark.parametrize("queries", [1, 70])
@pytest.mark.parametrize("bias", [float("nan"), float("inf")])
def test_hidden_keys_stay_hidden_whatever_the_mask_adds(
    bias: float, queries: int, isa_name: str
) -> None:
    case = replace(CASES[3], isa=isa_name)
    for is_causal, window in ((True, 40), (queries > 1, 0)):
        given = case.arguments(queries, 150, is_causal, window)
        mask = given[3]
        assert isinstance(mask, Tensor)
        mask[..., 100] = bias  # in the window of some queries, hidden from the others
        low = case.lower()
        got, want = low.op(*given, 0, 0, low.handle), case.meaning(given)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-5, equal_nan=True)
        assert not got.isnan().all() or not window
        assert got.isnan().any() or queries == 1


@pytest.mark.parametrize("queries", [1, 70])
def test_factors_without_a_logarithm_skip_nothing(queries: int) -> None:
    case = CASES[0]
    given = case.arguments(queries, 333, True, 0)
    odd = torch.tensor([float("nan"), 1e9, 1e9, -1.0, 1e9, 1e9])
    given = replaced(replaced(given, 4, odd), 5, odd)
    case.check_given(given)
    low = case.lower()
    _, counted = run_counted(low.op, *given, 0, 0, low.handle)
    free = replaced(replaced(given, 4, torch.zeros(6)), 5, torch.zeros(6))
    assert torch.equal(counted[:, [0, 3]], case.kept(free).sum(-1).int()[:, [0, 3]])


@pytest.mark.parametrize("shape", [(0, 3, 3), (1, 0, 3), (1, 3, 0), (1, 1, 0)], ids=str)
def test_nothing_to_do(shape: tuple[int, int, int]) -> None:
    batch, queries, keys = shape
    low = Case("skip_softmax").lower()
    q, k = torch.randn(batch, 6, queries, 40), torch.randn(batch, 2, keys, 40)
    factor = torch.ones(6)
    seen = (True, 0.1, 0, 64, 64, "sink_diagonal")
    got = low.op(q, k, k, None, factor, factor, *seen, 0, 0, low.handle)
    assert got.shape == q.shape and not got.any()


@pytest.mark.parametrize("case", [CASES[0], CASES[6]], ids=str)
@pytest.mark.parametrize("queries", [1, 200])
def test_threads_do_not_change_a_bit(case: Case, queries: int) -> None:
    low, given = case.lower(), case.arguments(queries, 2500 if queries == 1 else 200, True, 0)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = low.op(*given, 0, 0, low.handle)
        torch.set_num_threads(2)
        two = low.op(*given, 0, 0, low.handle)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, two)


def test_large_scores_do_not_overflow() -> None:
    case = Case("skip_softmax")
    given = case.arguments(70, 200, True, 0)
    q = given[0]
    assert isinstance(q, Tensor)
    free = replaced(replaced(given, 4, torch.zeros(6)), 5, torch.zeros(6))
    low = case.lower()
    got = low.op(q * 100, *free[1:], 0, 0, low.handle)
    want = case.meaning((q * 100, *free[1:]))
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-3)


def test_widened_operands_are_float64() -> None:
    wide = widened(CASES[4].arguments(5, 5, True, 0))
    assert [x.dtype for x in wide[:3] if isinstance(x, Tensor)] == [torch.float64] * 3
