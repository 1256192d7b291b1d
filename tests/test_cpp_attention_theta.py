"""Generated C++ Top-Theta attention against its meaning in float64."""

from dataclasses import replace
from itertools import count, product

import pytest
import torch
from torch import Tensor

from sparsefx.attention import meaning
from sparsefx.attention.interpolate import at_lengths
from sparsefx.attention.spec import DENOMINATORS, PLACEMENTS
from sparsefx.codegen.cpp.attention.call import run_counted
from tests.cpp_attention_cases import CLOSE, ISAS, LENGTHS, ROUNDING, SEEN, Case, replaced, widened

TOPK = 20
OPTIONS = list(product(PLACEMENTS, DENOMINATORS, (False, True)))
CASES = [
    Case("theta"),
    Case("theta", mask="bool", dim=64, dtype=torch.bfloat16, kv_heads=6),
    Case("theta", mask="float", dim=33, kv_heads=1),
    Case("theta", dim=80, dtype=torch.float16),
]


def _arguments(
    case: Case,
    queries: int,
    keys: int,
    seen: tuple[bool, int],
    options: tuple[str, str, bool],
    points: int = 3,
) -> tuple[object, ...]:
    """Operands whose scores and probabilities are not too close to their thresholds."""
    lengths = torch.tensor([TOPK, 60, 250])[:points]
    for seed in count():
        random = torch.Generator().manual_seed(seed)
        q = torch.randn(2, queries, case.heads, case.dim, generator=random).transpose(1, 2)
        k, v = torch.randn(2, 2, case.kv_heads, keys, case.dim, generator=random)
        mask = case.drawn_mask(random, queries, keys)
        theta = torch.rand(case.heads, points, generator=random) + 0.5
        if options[0] == "post":
            theta = theta / 60
        lost = torch.rand(case.heads, points, generator=random) * 30
        operands = [x.to(case.dtype) for x in (q, k, v)]
        tables = (lengths, theta, lost, seen[0], case.dim**-0.5, seen[1], TOPK, *options)
        given = (*operands, mask, *tables)
        if _margin(given) > CLOSE:
            return given
    raise AssertionError  # count() has no end


def _margin(given: tuple[object, ...]) -> float:
    q, k, _, mask, lengths, theta, _, is_causal, scale, window, _, placement, *_ = widened(given)
    s = meaning.scores(q, k, mask, is_causal, scale, window)  # type: ignore[arg-type]
    compared = meaning.softmax(s) if placement == "post" else s
    limit = at_lengths(lengths, theta, (s > float("-inf")).sum(-1))  # type: ignore[arg-type]
    near = ((compared - limit[..., None]) / limit[..., None]).abs()
    return float(near[s > float("-inf")].min()) if (s > float("-inf")).any() else 1.0


def _check(case: Case, given: tuple[object, ...]) -> None:
    low = case.lower()
    got, counted = run_counted(low.op, *given, 0, 0, low.handle)
    want = case.meaning(given)
    bound = ROUNDING[case.dtype] * max(float(want.abs().max()), 1.0)
    error = float((got.double() - want).abs().max())
    label = f"{case} {[tuple(x.shape) for x in given[:2]]} {given[7:]}"  # type: ignore[attr-defined]
    assert got.dtype == case.dtype and error <= bound, f"{label}: {error:.2e} > {bound:.2e}"
    assert torch.equal(counted, _kept(given)), label


def _kept(given: tuple[object, ...]) -> Tensor:
    """Elements that each row keeps, told from rows of V that are the unit vectors."""
    q, k, _, mask, *rest = widened(given)
    assert isinstance(q, Tensor) and isinstance(k, Tensor)
    unit = torch.eye(k.shape[2], dtype=torch.float64).expand(*k.shape[:2], -1, -1)
    weights = meaning.theta_attention(q, k, unit, mask, *rest[:-1], False)  # type: ignore[arg-type]
    return (weights != 0).sum(-1).int()


ON_EVERY_ISA = [replace(case, isa=name) for name in ISAS[1:] for case in CASES[2:]]


@pytest.mark.parametrize("case", CASES + ON_EVERY_ISA, ids=str)
def test_result_and_kept_elements(case: Case) -> None:
    for i, (lengths, options) in enumerate(zip(LENGTHS * 3, OPTIONS + OPTIONS[:5], strict=True)):
        _check(case, _arguments(case, *lengths, SEEN[i % len(SEEN)], options))


@pytest.mark.parametrize("queries", [1, 64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option(options: tuple[str, str, bool], queries: int) -> None:
    _check(CASES[0], _arguments(CASES[0], queries, 150, (True, 0), options))


@pytest.mark.parametrize("queries", [1, 64])
def test_elements_are_really_dropped(queries: int) -> None:
    given = _arguments(CASES[0], queries, 150, (True, 0), ("pre", "exact", False))
    low = CASES[0].lower()
    _, counted = run_counted(low.op, *given, 0, 0, low.handle)
    assert int(counted.min()) > 0 and int(counted.max()) < 0.7 * 150


def test_one_known_length_serves_all() -> None:
    options = ("pre", "offline", True)
    _check(CASES[0], _arguments(CASES[0], 70, 150, (True, 0), options, points=1))


@pytest.mark.parametrize("isa_name", ISAS)
@pytest.mark.parametrize("queries", [1, 70])
def test_nan_stays_where_dense_has_it(queries: int, isa_name: str) -> None:
    case = Case("theta", isa=isa_name)
    given = _arguments(case, queries, 200, (True, 0), ("pre", "exact", True))
    k = given[1]
    assert isinstance(k, Tensor)
    k[1, 0, 150] = float("nan")
    low = case.lower()
    got, want = low.op(*given, 0, 0, low.handle), case.meaning(given)
    assert torch.equal(got.isnan(), want.isnan()) and got.isnan().any()


@pytest.mark.parametrize("isa_name", ISAS)
@pytest.mark.parametrize("queries", [1, 70])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_nothing_exceeds_a_threshold_that_is_nan(
    placement: str, queries: int, isa_name: str
) -> None:
    case = Case("theta", isa=isa_name)
    given = _arguments(case, queries, 150, (True, 0), (placement, "none", False))
    theta = given[5]
    assert isinstance(theta, Tensor)
    theta[1], theta[4] = float("nan"), float("inf")
    _check(case, given)
    low = case.lower()
    _, counted = run_counted(low.op, *given, 0, 0, low.handle)
    assert not counted[:, [1, 4]].any() and counted[:, 0].any()


@pytest.mark.parametrize("isa_name", ISAS)
@pytest.mark.parametrize("queries", [1, 70])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_rows_whose_softmax_is_nan_are_nan(
    options: tuple[str, str, bool], queries: int, isa_name: str
) -> None:
    case = replace(CASES[2], isa=isa_name)
    given = _arguments(case, queries, 150, (True, 40), options)
    mask, theta = given[3], given[5]
    assert isinstance(mask, Tensor) and isinstance(theta, Tensor)
    mask[0, 0, :, 100], mask[0, 1, :, 130] = float("inf"), float("nan")
    mask[1, 2, queries // 2, 120], theta[2] = float("inf"), float("nan")
    low = case.lower()
    got, want = low.op(*given, 0, 0, low.handle), case.meaning(given)
    q, k, _, seen, *rest = widened(given)
    dense = meaning.softmax(meaning.scores(q, k, seen, *rest[3:6]))  # type: ignore[arg-type]
    spoilt = dense.isnan().any(-1)
    assert spoilt.any() and not spoilt.all()
    finite = want.isfinite().all(-1)
    assert torch.equal(got.isnan().all(-1)[spoilt], spoilt[spoilt])
    assert torch.equal(got.isfinite().all(-1), finite) and not finite[spoilt].any()
    torch.testing.assert_close(got[finite].double(), want[finite], rtol=0, atol=1e-4)


@pytest.mark.parametrize("queries", [1, 70])
def test_rows_that_see_nothing_are_zero(queries: int) -> None:
    case = CASES[1]
    given = _arguments(case, queries, 100, (True, 0), ("pre", "none", True))
    given = replaced(given, 3, torch.zeros(1, 1, 1, 100, dtype=torch.bool))
    low = case.lower()
    assert not low.op(*given, 0, 0, low.handle).any()


def test_threads_do_not_change_a_bit() -> None:
    given = _arguments(CASES[0], 1, 2500, (True, 0), ("pre", "exact", True))
    low, before = CASES[0].lower(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = low.op(*given, 0, 0, low.handle)
        torch.set_num_threads(2)
        two = low.op(*given, 0, 0, low.handle)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, two)
