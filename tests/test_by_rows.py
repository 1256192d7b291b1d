"""A graph whose calls bring different numbers of rows: one node, and a table of who runs when."""

import json
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparsefx import by_rows
from sparsefx.by_rows import Costs, Dense, Pick, Route, Routes
from sparsefx.compiler import Compiler, Plan, inductor
from sparsefx.formats import pack_nm
from sparsefx.graph import capture
from sparsefx.guard import Verdict
from sparsefx.passes import pipelines
from sparsefx.passes.lower import Lower
from sparsefx.pipeline import PassContext, run
from sparsefx.report import Row
from sparsefx.session import Session
from sparsefx.target import LinearSpec, Lowering, by_dispatcher
from tests.compilers import accept_attention, accept_conv
from tests.pass_models import FUSED, TWO_FOUR, WIDTH, bias, calls, one, sparse, transposed, x_of
from tests.plain_target import PlainNM, plain

PLAIN = "sparsefx_plain::linear"
BY_ROWS = torch.ops.sparsefx_rows.linear.default


def few_rows(most: int) -> Callable[..., Verdict]:
    """A guard for which kernels win on up to `most` rows."""

    def judge(spec: LinearSpec, weight: Tensor, bias: Tensor | None, made: Lowering) -> Verdict:
        assert not spec.rows_vary and not spec.epilogue
        return Verdict(10.0, 5.0 if spec.rows <= most else 20.0, "modelled")

    return judge


@pytest.mark.parametrize("stored", ["out in", "in out"])
def test_the_operator_runs_what_the_routes_say(stored: str) -> None:
    linear = sparse(TWO_FOUR)
    packed = [torch.zeros(1), *pack_nm(linear.weight.detach(), 2, 4)]
    other = torch.randn(linear.weight.shape, dtype=torch.float64)  # tells dense from the kernel
    weight = other if stored == "out in" else other.t().contiguous()
    pick = Pick(PLAIN, "2|4|", (1, 2), multiple=2)
    routes = str(Routes((Route(1, (pick,)), Route(5, ())), Dense(transposed=stored == "in out")))
    for shape, matrix in (
        ((2, WIDTH), linear.weight),
        ((2, 2, WIDTH), linear.weight),
        ((3, WIDTH), other),  # no multiple of 2
        ((5, WIDTH), other),
        ((3, 2, WIDTH), other),
        ((0, WIDTH), linear.weight),
    ):
        x = torch.randn(shape, dtype=torch.float64)
        result = BY_ROWS(x, packed, weight, linear.bias, [], routes, WIDTH)
        torch.testing.assert_close(result, F.linear(x, matrix, linear.bias))


def test_the_operator_is_well_formed() -> None:
    weight = torch.randn(8, 4)
    routes = str(Routes((Route(1, ()),)))
    args = (torch.randn(2, 3, 4), [weight], weight, torch.randn(8), [], routes, 8)
    torch.library.opcheck(BY_ROWS, args)


def test_choosing_costs_microseconds() -> None:
    assert 0 <= by_rows.dispatch_us("cpu") < 1000
    assert by_rows.dispatch_us("cuda") == 0


def lowered(
    model: nn.Module, judge: object, dispatch_us: float = 0.0, *kernels: PlainNM
) -> tuple[fx.GraphModule, Row, PassContext]:
    sizes = ({0: torch.export.Dim("rows", max=64)},)
    gm = capture(model, (x_of(),), dynamic_shapes=(sizes,))
    ctx = PassContext()
    passes = (*FUSED, Lower(plain(*kernels), judge, costs=Costs(lambda: dispatch_us)))  # type: ignore[arg-type]
    run(gm, passes, ctx)
    for rows in (2, 3, 8, 9, 40, 64):
        x = x_of(rows, WIDTH)
        torch.testing.assert_close(gm(x), model(x))
    return gm, next(iter(ctx.rows.values())), ctx


def test_a_table_takes_the_place_of_the_node() -> None:
    gm, row, ctx = lowered(one(lambda s, x: F.silu(s.l(x)) * 0.5), few_rows(8))
    assert calls(gm) == ["sparsefx_rows.linear.default", "aten.silu.default", "aten.mul.Tensor"]
    assert (row.kernel, row.by_rows, row.reason) == ("plain_nm", "plain_nm 1..8, dense 9..", "")
    assert (row.dense_us, row.sparse_us, row.chosen_us) == (10.0, 5.0, 5.0)
    assert ctx.baked == {"l.weight"}
    (node,) = (n for n in gm.graph.nodes if n.target is BY_ROWS)
    firsts = [(each["first"], len(each["picks"])) for each in json.loads(node.args[5])["routes"]]
    assert firsts == [(1, 1), (9, 0)]


@pytest.mark.parametrize(
    "forward",
    [lambda s, x: x @ s.w, lambda s, x: F.gelu(torch.addmm(s.b, x, s.w))],
    ids=["product", "addmm"],
)
def test_weights_stored_in_out_stay_as_they_are(forward: Callable[..., object]) -> None:
    model = one(forward, w=transposed(TWO_FOUR), b=bias(WIDTH))
    gm, row, _ = lowered(model, few_rows(8))
    assert row.by_rows == "plain_nm 1..8, dense 9.."
    (node,) = (n for n in gm.graph.nodes if n.target is BY_ROWS)
    assert isinstance(node.args[2], fx.Node) and node.args[2].target == "w"


def test_a_kernel_that_wins_at_all_rows_is_called_alone() -> None:
    def judge(spec: LinearSpec, *_: object) -> Verdict:
        return Verdict(10.0, 5.0, "modelled")

    gm, row, _ = lowered(one(lambda s, x: F.silu(s.l(x))), judge)
    assert calls(gm) == ["sparsefx_plain.linear.default"], "the epilogue is inside"
    assert (row.kernel, row.by_rows) == ("plain_nm", "")


def test_dense_at_all_rows_is_the_plain_product() -> None:
    gm, row, ctx = lowered(one(lambda s, x: F.silu(s.l(x))), few_rows(0))
    assert calls(gm) == ["aten.linear.default", "aten.silu.default"]
    assert (row.kernel, row.by_rows, ctx.baked) == ("", "", set())
    assert row.reason == "plain_nm: the sparse kernel is not faster than dense (modelled)"


def test_a_choice_that_costs_too_much_is_not_made() -> None:
    gm, row, _ = lowered(one(lambda s, x: s.l(x)), few_rows(8), 1.0)
    assert calls(gm) == ["aten.linear.default"]
    assert row.reason == "plain_nm: choosing by rows would cost more than it gains"


def test_the_ladder_ends_at_the_bound_of_the_size() -> None:
    seen: set[int] = set()

    def judge(spec: LinearSpec, *_: object) -> Verdict:
        seen.add(spec.rows)
        return Verdict(10.0, 5.0, "modelled")

    lowered(one(lambda s, x: s.l(x)), judge)
    assert max(seen) == 64


@torch.no_grad()
def test_one_compilation_serves_all_rows() -> None:
    """Through torch.compile and Inductor: no break, no second graph, right numbers everywhere."""
    torch._dynamo.reset()
    model = one(lambda s, x: F.relu(s.l(x)) + 1)
    judges = pipelines.Judges(few_rows(8), accept_attention, accept_conv, proof=True)
    plan = Plan(pipelines.inference(plain(), judges), (), inductor({}, by_dispatcher))
    session = Session("one", "plain", "test")
    fast = torch.compile(model, backend=Compiler(plan, session), dynamic=True, fullgraph=True)
    for rows in (7, 2, 8, 9, 100, 5000):
        x = x_of(rows, WIDTH)
        torch.testing.assert_close(fast(x), model(x))
    assert len(session.graphs) == 1
    assert session.graphs[0].rows[0].by_rows == "plain_nm 1..8, dense 9.."
    model.l.weight.mul_(2)
    torch.testing.assert_close(fast(x), model(x))
