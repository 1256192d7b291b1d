"""A recipe given to the backend prunes copies, names decide, and misfits are errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsefx.errors import NonFiniteWeight, PatternDoesNotFit
from sparsefx.graph import capture
from sparsefx.passes.apply_recipe import ApplyRecipe
from sparsefx.pipeline import PassContext, run
from sparsefx.spec import NM, Recipe
from tests.pass_models import (
    FUSED,
    WIDTH,
    Around,
    after,
    assert_same_numbers,
    one,
    sparse,
    x_of,
)


class Tied(nn.Module):
    """A head that shares its weight with an embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(8, WIDTH, dtype=torch.float64)
        self.mid = sparse(None)
        self.head = sparse(None, WIDTH, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mid(self.embed(ids)))


@pytest.mark.parametrize(
    ("globs", "count"),
    [(("*",), 1), (("*.weight",), 1), (("head.weight",), 1), (("head.weight", "*"), 2)],
)
def test_a_head_tied_to_an_embedding_is_pruned_only_by_name(
    globs: tuple[str, ...], count: int
) -> None:
    ids = torch.arange(4)
    gm = capture(Tied(), (ids,))
    tied = {str(n.target) for n in gm.graph.find_nodes(op="get_attr")} & {
        "head.weight",
        "embed.weight",
    }
    names = {"head.weight": NM(2, 4), "embed.weight": NM(2, 4)}
    recipe = Recipe({k: v for glob in globs for k, v in _named(glob, tied, names).items()})
    assert run(gm, (ApplyRecipe(recipe),), PassContext())["apply_recipe"] == count


def _named(glob: str, tied: set[str], names: dict[str, NM]) -> dict[str, NM]:
    return {name: names[name] for name in tied} if glob == "head.weight" else {glob: NM(2, 4)}


def test_a_recipe_prunes_a_copy_once_for_all_its_uses() -> None:
    model = one(lambda s, x: s.d(torch.tanh(s.d(x))), d=sparse(None))
    before = model.d.weight.detach().clone()
    passes = (ApplyRecipe(Recipe({"d.*": NM(2, 4)})), *FUSED)
    gm, ctx, counts = after(model, passes)
    assert (counts["apply_recipe"], counts["pack_nm"]) == (2, 2)
    assert "d.weight" in ctx.baked
    assert {row.name for row in ctx.rows.values()} == {"d"}
    assert torch.equal(model.d.weight, before)
    with torch.no_grad():
        model.d.weight.mul_(NM(2, 4).keep(before.abs()))
    assert_same_numbers(gm, model)


def test_a_recipe_prunes_along_the_input_of_a_transposed_weight() -> None:
    model = Around(lambda s, x: x @ s.w, w=nn.Parameter(x_of(WIDTH, WIDTH, seed=3)))
    gm, _, counts = after(model, (ApplyRecipe(Recipe({"w": NM(2, 4)})), *FUSED))
    assert (counts["apply_recipe"], counts["pack_nm"]) == (1, 1)
    with torch.no_grad():
        model.w.t().mul_(NM(2, 4).keep(model.w.t().abs()))
    assert_same_numbers(gm, model)


def test_what_a_recipe_cannot_do_is_an_error() -> None:
    model = one(lambda s, x: s.l(x))
    with pytest.raises(PatternDoesNotFit, match=r"l\.weight"):
        after(model, (ApplyRecipe(Recipe({"*": NM(2, 5)})),))
    with torch.no_grad():
        model.l.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteWeight, match=r"l\.weight has 1 NaN"):
        after(model, (ApplyRecipe(Recipe({"*": NM(2, 4)})),))


def test_what_a_recipe_leaves_dense() -> None:
    model = one(lambda s, x: s.l(x) + F.linear(x, s.l.weight * 2))
    recipe = Recipe({"l.*": None, "*": NM(2, 4)})
    _, _, counts = after(model, (ApplyRecipe(recipe),))
    assert counts["apply_recipe"] == 0
