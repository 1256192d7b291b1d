"""Every layer has a row, whichever graph it is in; and models do not disturb each other."""

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.errors import InvalidSetting
from sparsefx.spec import NM, Recipe
from tests.test_api import two


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


def test_sizes_of_one_model_say_nothing_of_another() -> None:
    """torch remembers which sizes vary by the name of the code that it captures."""
    for rows in (3, 5, 7):
        fast = sparsefx.compile(two(), guard="off")
        with torch.no_grad():
            fast(torch.randn(rows, 32))
        assert {row.shape.split(" @ ")[1] for row in sparsefx.explain(fast).rows} == {str(rows)}


class Halved(nn.Module):
    """Its two graphs share no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.late, self.early = nn.Linear(32, 8), nn.Linear(32, 32)
        self.never = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.early(x)
        torch._dynamo.graph_break()
        z: Tensor = self.late(y)
        return z


@torch.no_grad()
@pytest.mark.parametrize("door", ["api", "backend"])
def test_a_graph_break_loses_no_row(door: str) -> None:
    model = sparsefx.sparsify(Halved(), Recipe({"*": NM(2, 4)}), progress=False)
    fast = (
        sparsefx.compile(model, guard="off")
        if door == "api"
        else torch.compile(model, backend="sparsefx", options={"guard": "off"})
    )
    fast(torch.randn(3, 32))
    report = sparsefx.explain(fast)
    kernels = {row.name: row.kernel for row in report.rows}
    assert kernels == {"early": "cpp_nm_linear", "late": "cpp_nm_linear", "never": ""}
    assert len({row.graph for row in report.rows if row.kernel}) == 2
    assert "in no captured graph" in next(r.reason for r in report.rows if r.name == "never")
    assert report.facts["graphs"] == "2"


def test_a_recipe_that_gradients_leave_unused_says_so() -> None:
    recipe = Recipe({"first.*": NM(2, 4), "nope.*": None})
    compiled = torch.compile(two(), backend="sparsefx", options={"recipe": recipe})
    compiled(torch.randn(3, 32))
    report = sparsefx.explain(compiled)
    assert all("the recipe is not applied" in row.reason for row in report.rows)
    assert report.facts["recipe keys that matched nothing"] == "nope.*"


@torch.no_grad()
def test_a_skipped_pass_is_named_as_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEFX_SKIP", "pack_nm,pack_bitmap")
    model = two()
    fast, x = sparsefx.compile(model, guard="off"), torch.randn(4, 32)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    reasons = {row.reason for row in sparsefx.explain(fast).rows}
    assert reasons == {"SPARSEFX_SKIP left out pack_bitmap, pack_nm"}


def test_a_misspelt_pass_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEFX_SKIP", "pack-nm")
    rule = r"SPARSEFX_SKIP='pack-nm'.*pack_nm, pack_block, pack_bitmap"
    with pytest.raises(InvalidSetting, match=rule):
        sparsefx.compile(two())
