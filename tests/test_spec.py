"""Patterns keep exact counts, and break ties by index; a Recipe says which weight gets which."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsefx.attention.spec import SkipSoftmax, Theta
from sparsefx.criteria import DSnoT
from sparsefx.errors import InvalidPattern, InvalidRecipe, InvalidThreshold
from sparsefx.patterns import Columns, Rows, keep_highest
from sparsefx.spec import NM, Block, Magnitude, Pattern, Recipe, Unstructured


def scores(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.77, 0.999])
def test_unstructured_drops_exactly_its_share_and_the_lowest(sparsity: float) -> None:
    given_scores = scores(7, 13)
    keep = Unstructured(sparsity).keep(given_scores)
    drop = int(sparsity * 91)
    assert int((~keep).sum()) == drop
    if drop:
        assert given_scores[~keep].max() < given_scores[keep].min()


@pytest.mark.parametrize(("n", "m"), [(n, m) for m in (4, 8, 16) for n in range(1, m)])
def test_nm_keeps_the_n_highest_of_every_group(n: int, m: int) -> None:
    given_scores = scores(5, 3 * m)
    keep = NM(n, m).keep(given_scores).view(-1, m)
    groups = given_scores.view(-1, m)
    assert (keep.sum(1) == n).all()
    assert (groups.masked_fill(keep, -1).amax(1) < groups.masked_fill(~keep, 2).amin(1)).all()


def test_block_keeps_or_drops_whole_tiles_of_highest_sum() -> None:
    given_scores = scores(8, 12)
    keep = Block(4, 3, 0.5).keep(given_scores)
    tiles = keep.view(2, 4, 4, 3).permute(0, 2, 1, 3).reshape(8, 12)
    sums = given_scores.view(2, 4, 4, 3).sum((1, 3)).flatten()
    assert (tiles.all(1) | (~tiles).all(1)).all()
    assert int(tiles[:, 0].sum()) == 4
    assert sums[~tiles[:, 0]].max() < sums[tiles[:, 0]].min()


def test_rows_and_columns_go_as_a_whole_by_their_summed_score() -> None:
    given_scores = scores(8, 12)
    for pattern, dim, drop in ((Rows(0.4), 1, 3), (Columns(0.3), 0, 3)):
        keep = pattern.keep(given_scores)
        kept, sums = keep.any(dim), given_scores.sum(dim)
        assert torch.equal(kept, keep.all(dim))
        assert int((~kept).sum()) == drop
        assert sums[~kept].max() < sums[kept].min()
        before = keep.clone()
        keep[0, 0] = not keep[0, 0]  # memory of its own, not a view that repeats one vector
        assert int((keep != before).sum()) == 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 5), max_size=2),
    st.integers(1, 20).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))),
    st.integers(1, 4),
    st.integers(0, 2**31),
)
def test_the_highest_are_those_of_a_stable_sort(
    shape: list[int], sizes: tuple[int, int], distinct: int, seed: int
) -> None:
    size, count = sizes
    tied = (scores(*shape, size, seed=seed) * distinct).round()
    order = tied.sort(dim=-1, stable=True, descending=True).indices[..., :count]
    expected = torch.zeros_like(tied, dtype=torch.bool).scatter_(-1, order, True)
    assert torch.equal(keep_highest(tied, count), expected)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (NM(2, 4), [1, 1, 0, 0] * 2),
        (NM(1, 8), [1] + [0] * 7),
        (Unstructured(0.25), [1] * 6 + [0] * 2),
        (Block(1, 2, 0.5), [1] * 4 + [0] * 4),
        (Columns(0.5), [1] * 4 + [0] * 4),
        (Rows(0.5), [1] * 8),  # half of one row is none
    ],
)
def test_ties_go_to_the_lower_index(pattern: Pattern, expected: list[int]) -> None:
    for tied in (torch.zeros(1, 8), torch.ones(1, 8)):
        assert pattern.keep(tied).int().flatten().tolist() == expected


def test_keep_does_not_depend_on_memory_layout() -> None:
    given_scores = scores(16, 32)
    transposed = given_scores.t().contiguous().t()
    for pattern in (NM(2, 4), Unstructured(0.3), Block(4, 8, 0.4), Rows(0.5), Columns(0.5)):
        assert torch.equal(pattern.keep(given_scores), pattern.keep(transposed))


def test_misfits_name_the_numbers() -> None:
    assert NM(2, 4).misfit(torch.Size((3, 8))) is None
    assert "10 input features" in str(NM(2, 4).misfit(torch.Size((3, 10))))
    assert Block(4, 4, 0.5).misfit(torch.Size((8, 4))) is None
    assert "6 x 4" in str(Block(4, 4, 0.5).misfit(torch.Size((6, 4))))
    assert Unstructured(0.5).misfit(torch.Size((1, 1))) is None


def test_texts_and_sparsity() -> None:
    patterns = (NM(2, 4), Unstructured(0.5), Block(32, 16, 0.25), Rows(0.25), Columns(0.5))
    texts = [str(pattern) for pattern in patterns]
    assert texts == ["2:4", "unstructured 50%", "block 32x16 25%", "rows 25%", "columns 50%"]
    assert NM(1, 4).sparsity == 0.75  # N is what is kept


@pytest.mark.parametrize(
    "make",
    [
        lambda: NM(4, 4),
        lambda: NM(0, 4),
        lambda: NM(-1, 4),
        lambda: Unstructured(1.0),
        lambda: Unstructured(50),
        lambda: Unstructured(float("nan")),
        lambda: Block(0, 4, 0.5),
        lambda: Block(4, 4, -0.1),
        lambda: Rows(1.0),
        lambda: Columns(float("nan")),
        lambda: Block(4, 4, 0.5, DSnoT()),
        lambda: Rows(0.5, DSnoT()),
        lambda: Columns(0.5, DSnoT()),
        lambda: NM(2, 4, values="int3"),
        lambda: NM(2, 4, values=None),  # type: ignore[arg-type]
        lambda: NM(2, 4, values="int4", group=24),
        lambda: Unstructured(0.5, values="int4", group=-16),
        lambda: Unstructured(0.5, values="int8", group=16.0),  # type: ignore[arg-type]
        lambda: Unstructured(0.5, group=16),
        lambda: Block(4, 4, 0.5, values="int8", group=16),
    ],
)
def test_senseless_patterns_are_refused(make: object) -> None:
    with pytest.raises(InvalidPattern, match="is not a sparsity pattern"):
        make()  # type: ignore[operator]  # a lambda of the list above


def test_values_have_a_group_of_their_kind_and_show_it() -> None:
    assert NM(2, 4, values="int4") == NM(2, 4, values="int4", group=128) != NM(2, 4)
    assert (NM(2, 4, values="int8").group, Block(1, 16, 0.5, values="int4").group) == (0, 0)
    texts = {
        "2:4 int4": NM(2, 4, values="int4"),
        "2:4 int4/64": NM(2, 4, values="int4", group=64),
        "2:4 int4/row": NM(2, 4, values="int4", group=0),
        "unstructured 80% int8_dynamic": Unstructured(0.8, values="int8_dynamic"),
        "unstructured 80% int8/128": Unstructured(0.8, values="int8", group=128),
        "block 1x16 50% int4": Block(1, 16, 0.5, values="int4"),
    }
    assert [str(pattern) for pattern in texts.values()] == list(texts)


def test_magnitude_scores_are_float32_absolute_values() -> None:
    found = Magnitude().scores(torch.tensor([[-2.0, 0.5]], dtype=torch.bfloat16))
    assert found.dtype == torch.float32
    assert found.tolist() == [[2.0, 0.5]]


def test_first_match_wins_and_none_is_dense() -> None:
    recipe = Recipe({"*.head.*": None, "*.mlp.*": NM(2, 4), "*": Unstructured(0.5)})
    assert recipe.pattern_for("a.head.weight") is None
    assert recipe.pattern_for("a.mlp.weight") == NM(2, 4)
    assert recipe.pattern_for("b.weight") == Unstructured(0.5)
    assert Recipe().pattern_for("b.weight") is None


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        ({"*": "2:4"}, r"recipe weights\['\*'\]: '2:4' is not a pattern"),
        ({1: NM(2, 4)}, "the key 1 is not a glob"),
        ([("*", NM(2, 4))], "is not a dict"),
    ],
)
def test_recipes_of_wrong_types_are_refused(weights: Any, text: str) -> None:  # Any: what is tested
    with pytest.raises(InvalidRecipe, match=text):
        Recipe(weights)


def test_numbers_of_wrong_types_are_refused() -> None:
    wrong: list[Any] = [  # Any: what is tested
        lambda: NM(2.0, 4),  # type: ignore[arg-type]
        lambda: NM("2", 4),  # type: ignore[arg-type]
        lambda: Block(16.0, 16, 0.5),  # type: ignore[arg-type]
        lambda: Unstructured("0.5"),  # type: ignore[arg-type]
    ]
    for make in wrong:
        with pytest.raises(InvalidPattern):
            make()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: SkipSoftmax(), "exactly one of sparsity, error and scale_factor"),
        (lambda: SkipSoftmax(sparsity=0.5, error=0.1), "exactly one of"),
        (lambda: SkipSoftmax(sparsity=1.0), r"sparsity=1\.0 must lie in \(0, 1\)"),
        (lambda: SkipSoftmax(error=float("nan")), r"error=nan must lie in \(0, 1\)"),
        (lambda: SkipSoftmax(sparsity=True), "sparsity=True must lie in"),
        (lambda: SkipSoftmax(scale_factor=float("inf")), "a scale factor is a finite number"),
        (lambda: SkipSoftmax(scale_factor=(1.0, -1.0)), "a scale factor is a finite number"),
        (lambda: SkipSoftmax(scale_factor=(1, 2, 3)), "or two of them"),
        (lambda: SkipSoftmax(scale_factor=()), "or two of them"),
        (lambda: SkipSoftmax(sparsity=0.5, tile=64), "tile=64 must be two of"),
        (lambda: SkipSoftmax(sparsity=0.5, tile=(64, 64.0)), "must be two of"),
        (lambda: SkipSoftmax(sparsity=0.5, tile=(64, 64, 64)), "must be two of"),
        (lambda: SkipSoftmax(sparsity=0.5, within=0.0), r"within=0\.0 must lie in"),
        (lambda: SkipSoftmax(sparsity=0.5, per="layer"), "per='layer' is not one of"),
        (lambda: Theta(0), "k=0 must be a whole number from 1 on"),
        (lambda: Theta(64, dense_layers=True), "dense_layers=True must be a whole number"),
        (lambda: Theta(64, deviations=float("nan")), "deviations=nan must be a finite number"),
        (lambda: Theta(64, v_mean=1), "v_mean=1 must be True or False"),
        (lambda: Theta(64, denominator="half"), "denominator='half' is not one of"),
    ],
)
def test_senseless_attention_is_refused(make: Callable[[], object], says: str) -> None:
    with pytest.raises(InvalidThreshold, match=says):
        make()


def test_the_first_glob_decides_on_attention() -> None:
    skip = SkipSoftmax(sparsity=0.5)
    recipe = Recipe(attention={"*.0.*": None, "*.1.*": Theta(64), "*": skip})
    wanted = [recipe.attention_for(f"layers.{at}.attn") for at in range(3)]
    assert wanted == [None, Theta(64), skip]
    assert Recipe(attention=skip).attention_for("anything") == skip
    assert Recipe().attention_for("anything") is None


@pytest.mark.parametrize("attention", ["dense", {"*": "theta"}, {3: Theta(64)}, NM(2, 4)])
def test_recipes_of_no_attention_are_refused(attention: Any) -> None:  # Any: what is tested
    with pytest.raises(InvalidRecipe, match="recipe attention"):
        Recipe(attention=attention)
