"""The example pass of docs/write_a_pass.md: counts, numbers, rows that vary, and its own main()."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from examples import write_a_pass
from examples.write_a_pass import Branches, DropZeroLinears
from sparsefx.graph import capture
from sparsefx.passes.detect import Detect
from sparsefx.pipeline import PassContext, run
from tests.pass_models import Around, after, assert_same_numbers, calls, x_of

PASSES = (Detect(), DropZeroLinears())
PAGE = Path(__file__).parent.parent / "docs" / "write_a_pass.md"


def zero(bias: bool = True, in_: int = 16, out: int = 8) -> nn.Linear:
    linear = nn.Linear(in_, out, bias=bias, dtype=torch.float64)
    nn.init.zeros_(linear.weight)
    return linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 3, 16), (0, 16)])
def test_drops_a_zero_linear(bias: bool, shape: tuple[int, ...]) -> None:
    model, x = Around(lambda s, x: s.l(x), l=zero(bias)), x_of(*shape)
    gm, ctx, counts = after(model, PASSES, x)
    assert counts["drop_zero_linears"] == 1
    assert "aten.linear.default" not in calls(gm)
    assert_same_numbers(gm, model, x)
    assert ctx.baked == {"l.weight"}
    assert "replaced by its bias" in next(iter(ctx.rows.values())).reason


def test_one_graph_for_every_batch_size() -> None:
    model = Branches().double()
    batch = ({0: torch.export.Dim("batch")},)
    gm, ctx = capture(model, (x_of(3, 8),), dynamic_shapes=batch), PassContext()
    assert run(gm, PASSES, ctx)["drop_zero_linears"] == 1
    for rows in (1, 3, 7):
        assert_same_numbers(gm, model, x_of(rows, 8))


KEPT = {
    "one weight is left": lambda s, x: s.almost(x),
    "the weight is computed": lambda s, x: F.linear(x, s.l.weight * 2),
    "no input features": lambda s, x: s.empty(x[:, :0]),
}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # the empty weight
def test_keeps(name: str) -> None:
    almost = zero()
    with torch.no_grad():
        almost.weight[3, 5] = 1e-30
    model = Around(KEPT[name], l=zero(), almost=almost, empty=zero(in_=0))
    gm, _, counts = after(model, PASSES)
    assert counts["drop_zero_linears"] == 0
    assert_same_numbers(gm, model)


def test_main_prints_what_it_did(capsys: pytest.CaptureFixture[str]) -> None:
    write_a_pass.main()
    printed = capsys.readouterr().out
    before, behind = printed.split("after")
    assert (before.count("aten.linear.default"), behind.count("aten.linear.default")) == (2, 1)
    assert "linears dropped: 1" in printed
    assert "largest difference: 0.0" in printed


def test_the_page_shows_the_code_that_runs() -> None:
    """Each line of the page's Python blocks stands in the example, this file, or the pass."""
    sources = Path(write_a_pass.__file__).read_text() + Path(__file__).read_text()
    known = {line.strip() for line in sources.splitlines()}
    shown = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(shown) == 2
    foreign = {line.strip() for block in shown for line in block.splitlines()} - known
    assert foreign == set()
