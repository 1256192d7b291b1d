"""Every criterion under every pattern: exact counts, the stated order of errors, typed errors."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparsefx
from sparsefx.annotations import annotations
from sparsefx.calibrate.statistics import STATISTICS, Gram, Sketch
from sparsefx.criteria import Criterion, DSnoT, Magnitude, Random, SparseGPT, Wanda
from sparsefx.errors import (
    InvalidCriterion,
    InvalidPattern,
    MissingCalibration,
    MissingStatistics,
    NonFiniteStatistics,
)
from sparsefx.graph import capture
from sparsefx.passes.apply_recipe import ApplyRecipe
from sparsefx.patterns import NM, Block, Columns, Pattern, Rows, Unstructured
from sparsefx.pipeline import PassContext, run
from sparsefx.prune.solve import output_error, solve
from tests.layer_inputs import correlated, observed, squared_errors, weight_of

CPU = torch.device("cpu")

CRITERIA: list[Criterion] = [
    Magnitude(),
    Random(3),
    Wanda(),
    SparseGPT(),
    DSnoT(),
    DSnoT(SparseGPT(), guard=False),
]
PATTERNS: list[Callable[[Criterion], Pattern]] = [
    lambda criterion: Unstructured(0.6, criterion),
    lambda criterion: NM(2, 4, criterion),
    lambda criterion: NM(1, 6, criterion),
    lambda criterion: Block(4, 8, 0.5, criterion),
    lambda criterion: Rows(0.3, criterion),
    lambda criterion: Columns(0.3, criterion),
]


CASES = [
    pytest.param(make(criterion), criterion, id=f"{make(criterion)} {criterion}")
    for make in PATTERNS
    for criterion in CRITERIA
    if make in PATTERNS[:3] or not isinstance(criterion, DSnoT)  # which swaps single weights
]


@pytest.mark.parametrize(("pattern", "criterion"), CASES)
def test_a_solved_weight_has_the_pattern_and_the_input_is_untouched(
    pattern: Pattern, criterion: Criterion
) -> None:
    x = correlated(200, 48)
    x[:, 7] = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        weight = weight_of(20, 48).to(dtype)
        before = weight.clone()
        solved = solve(weight, pattern, observed(x, *criterion.needs))
        assert torch.equal(weight, before)
        assert solved.weight.dtype == torch.float32 and solved.weight.shape == (20, 48)
        assert solved.weight.isfinite().all() and not solved.weight[~solved.keep].any()
        assert int((~solved.keep).sum()) == pruned_by(pattern, criterion)
        if not criterion.updates:
            assert torch.equal(solved.weight, torch.where(solved.keep, weight.float(), 0))


def pruned_by(pattern: Pattern, criterion: Criterion) -> int:
    """Zeros of a [20, 48] weight."""
    start = criterion.start if isinstance(criterion, DSnoT) else criterion
    match pattern:
        case Unstructured(sparsity=share):
            return 20 * int(48 * share) if isinstance(start, Wanda) else int(20 * 48 * share)
        case NM(n=n, m=m):
            return 20 * 48 // m * (m - n)
        case Block(rows=rows, cols=cols, sparsity=share):
            return int(20 * 48 // (rows * cols) * share) * rows * cols
        case Rows(sparsity=share):
            return int(20 * share) * 48
        case Columns(sparsity=share):
            return int(48 * share) * 20


@pytest.mark.parametrize("make", PATTERNS[:3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_errors_fall_from_random_to_magnitude_to_wanda_to_sparsegpt(
    make: Callable[[Criterion], Pattern], seed: int
) -> None:
    x, weight = correlated(600, 48, seed), weight_of(32, 48, seed + 10)
    statistics, gram = observed(x), Gram(48, x.device)
    gram.add(x, 1)
    order = (Random(), Magnitude(), Wanda(), DSnoT(), SparseGPT())
    errors = [output_error(weight, solve(weight, make(c), statistics).weight, gram) for c in order]
    assert errors[0] > errors[1] > errors[2] >= errors[3] > errors[4] > 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 8),
    st.integers(1, 40),
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 2**31),
)
def test_wanda_prunes_the_lowest_scores_of_each_row(
    out: int, width: int, sparsity: float, seed: int
) -> None:
    x, weight = correlated(30, width, seed), weight_of(out, width, seed)
    keep = solve(weight, Unstructured(sparsity, Wanda()), observed(x, "squares")).keep
    scores = weight.abs().double() * x.double().square().sum(0).sqrt()
    drop = int(width * sparsity)
    assert ((~keep).sum(1) == drop).all()
    highest_pruned = scores.masked_fill(keep, -1).amax(1)
    lowest_kept = scores.masked_fill(~keep, torch.inf).amin(1)
    assert (highest_pruned <= lowest_kept * (1 + 1e-6)).all()


def test_wanda_gives_ties_to_the_lower_index() -> None:
    keep = solve(torch.ones(2, 12), Unstructured(0.5, Wanda()), observed(torch.ones(3, 12))).keep
    assert keep.int().tolist() == [[1] * 6 + [0] * 6] * 2


def test_wanda_takes_its_norms_from_any_statistic_that_has_them() -> None:
    x, weight = correlated(100, 16), weight_of(4, 16)
    masks = [
        solve(weight, NM(2, 4, Wanda()), observed(x, name)).keep
        for name in ("squares", "moments", "gram")
    ]
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])


def test_extreme_norms_neither_overflow_nor_vanish() -> None:
    weight = torch.tensor([[1.0, 3.0, 2.0, 4.0]])
    for scale in (1e-150, 1e150):
        squares = observed(torch.ones(1, 4), "squares")
        squares["squares"].tensors["squares"].mul_(scale**2)
        keep = solve(weight, NM(2, 4, Wanda()), squares).keep
        assert keep.tolist() == [[False, True, False, True]]


def test_random_masks_depend_on_seed_and_shape_alone() -> None:
    pattern = Unstructured(0.5, Random(1))
    first = solve(weight_of(8, 32), pattern, {}).keep
    assert torch.equal(first, solve(weight_of(8, 32, 5), pattern, {}).keep)
    assert not torch.equal(first, solve(weight_of(8, 32), Unstructured(0.5, Random(2)), {}).keep)
    shares = torch.stack(
        [solve(torch.zeros(8, 32), Unstructured(0.5, Random(s)), {}).keep for s in range(200)]
    )
    assert (shares.float().mean(0) - 0.5).abs().max() < 0.2  # 5.6 standard deviations


def test_needs_are_names_of_statistics() -> None:
    for criterion in CRITERIA:
        assert criterion.needs <= set(STATISTICS)
    assert Magnitude().needs == Random().needs == frozenset()
    assert Wanda().needs == {"squares"} and SparseGPT().needs == {"gram"}
    assert DSnoT().needs == {"moments", "gram"} and DSnoT(guard=False).needs == {"moments"}
    assert DSnoT(SparseGPT(), guard=False).needs == {"moments", "gram"}


def test_what_is_needed_and_not_there_is_named() -> None:
    for criterion in (Wanda(), SparseGPT(), DSnoT()):
        with pytest.raises(MissingStatistics, match="is decided from a layer's inputs") as caught:
            solve(weight_of(4, 8), NM(2, 4, criterion), {})
        assert isinstance(caught.value, MissingCalibration)
    with pytest.raises(MissingStatistics, match="has no moments"):
        solve(weight_of(4, 8), NM(2, 4, DSnoT()), observed(correlated(9, 8), "gram"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("criterion", [Wanda(), SparseGPT(), DSnoT(Magnitude(), guard=False)])
def test_statistics_that_are_not_finite_are_refused(criterion: Criterion, bad: float) -> None:
    x = correlated(9, 8)
    x[3, 2] = bad
    with pytest.raises(NonFiniteStatistics, match="are NaN or infinite"):
        solve(weight_of(4, 8), NM(2, 4, criterion), observed(x, *criterion.needs))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Random(-1), "seed=-1 must be"),
        (lambda: Random(True), "seed=True must be"),
        (lambda: SparseGPT(damp=0), "damp=0 must be"),
        (lambda: SparseGPT(damp=float("nan")), "damp=nan must be"),
        (lambda: SparseGPT(block=0), "block=0 must be"),
        (lambda: SparseGPT(block=12.0), "block=12.0 must be"),  # type: ignore[arg-type]
        (lambda: DSnoT(DSnoT()), "start must be"),  # type: ignore[arg-type]
        (lambda: DSnoT(cycles=0), "cycles=0 must be"),
        (lambda: DSnoT(tolerance=-1.0), "tolerance=-1.0 must be"),
        (lambda: DSnoT(guard="yes"), "guard='yes' must be"),  # type: ignore[arg-type]
    ],
)
def test_senseless_criteria_are_refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises(InvalidCriterion, match=says):
        make()


@pytest.mark.parametrize("inputs", [Gram(24, CPU), Sketch(24, CPU)])  # a sketch of few is exact
def test_output_error_is_that_of_the_outputs(inputs: Gram | Sketch) -> None:
    x, weight = correlated(300, 24), weight_of(8, 24)
    pruned = solve(weight, NM(2, 4), {}).weight
    lost = squared_errors(x, weight, pruned).sum()
    whole = squared_errors(x, weight, torch.zeros_like(weight)).sum()
    expected = float((lost / whole).sqrt())
    assert output_error(weight, pruned, inputs) == 0  # nothing was seen
    inputs.add(x, 1)
    assert output_error(weight, pruned, inputs) == pytest.approx(expected, rel=1e-4)
    assert output_error(weight.bfloat16(), weight.bfloat16(), inputs) == 0


@pytest.mark.parametrize(("pattern", "criterion"), CASES)
def test_weights_and_inputs_of_zeros_are_no_trouble(pattern: Pattern, criterion: Criterion) -> None:
    for weight, x in (
        (torch.zeros(20, 48), correlated(9, 48)),
        (weight_of(20, 48), torch.zeros(9, 48)),
        (weight_of(20, 48), correlated(1, 48)),
    ):
        solved = solve(weight, pattern, observed(x))
        assert solved.weight.isfinite().all()
        assert int((~solved.keep).sum()) == pruned_by(pattern, criterion)


@pytest.mark.parametrize(
    "pattern",
    [Rows(0.5), Columns(0.5, Random(1)), NM(1, 6), NM(2, 3), Block(4, 8, 0.5), Unstructured(0.4)],
    ids=str,
)
def test_a_model_of_any_pattern_is_saved_loaded_and_explained(
    pattern: Pattern, tmp_path: Path
) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 4))
    recipe = sparsefx.Recipe({"0.weight": pattern})
    pruned = sparsefx.sparsify(model, recipe, progress=False)
    sparsefx.save(pruned, tmp_path, recipe=recipe)
    loaded = sparsefx.load(tmp_path, nn.Sequential(nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 4)))
    assert annotations(loaded) == {"0.weight": pattern}
    for name, value in pruned.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    x = torch.randn(3, 48)
    fast = sparsefx.compile(loaded, guard="off")
    with torch.no_grad():
        torch.testing.assert_close(fast(x), pruned(x))
    row = next(row for row in sparsefx.explain(fast).rows if row.name == "0")
    assert row.kernel or row.reason


def test_the_backend_which_sees_no_data_refuses_criteria_that_need_it() -> None:
    recipe = sparsefx.Recipe({"*": NM(2, 4, SparseGPT())})
    gm = capture(nn.Linear(8, 4), (torch.randn(2, 8),))
    with pytest.raises(MissingStatistics, match=r"SparseGPT.* is decided from a layer's inputs"):
        run(gm, (ApplyRecipe(recipe),), PassContext())
    random = sparsefx.Recipe({"*": NM(2, 4, Random())})
    assert run(gm, (ApplyRecipe(random),), PassContext()) == {"apply_recipe": 1}


@pytest.mark.parametrize("bad", [Wanda, "wanda", None])
@pytest.mark.parametrize("make", PATTERNS)
def test_what_is_no_criterion_is_refused(make: Callable[[Criterion], Pattern], bad: object) -> None:
    with pytest.raises(InvalidPattern, match="with brackets"):
        make(bad)  # type: ignore[arg-type]
    with pytest.raises(InvalidPattern):
        NM(True, 4)
