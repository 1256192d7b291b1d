"""Linears of one input become one: which, when, that the numbers stay, and what the report says."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsefx
from sparsefx.graph import capture
from sparsefx.guard import Verdict
from sparsefx.packing import Packing
from sparsefx.passes import pipelines
from sparsefx.passes.fuse_gated_mlp import FuseGatedMLP
from sparsefx.passes.lower import Lower
from sparsefx.passes.merge_projections import MergeProjections
from sparsefx.pipeline import Pass, PassContext, run
from sparsefx.spec import NM, Unstructured
from sparsefx.target import LinearSpec, Lowering
from tests.compilers import accept, eager_compiler, refuse
from tests.golden import assert_golden
from tests.pass_models import (
    FUSED,
    TWO_FOUR,
    WIDTH,
    Around,
    after,
    assert_same_numbers,
    calls,
    sparse,
    text,
    x_of,
)
from tests.plain_target import PlainNM, plain

HALF = WIDTH // 2


def passes(judge: object = accept, *kernels: PlainNM, proof: bool = True) -> tuple[Pass, ...]:
    lower = Lower(plain(*kernels), judge, proof)  # type: ignore[arg-type]
    return (*FUSED, FuseGatedMLP(lower), MergeProjections(lower), lower)


def linears(**widths: int | nn.Module) -> dict[str, nn.Module]:
    """2:4 linears of one input by name and width; others as they are."""
    torch.manual_seed(0)
    return {
        name: sparse(TWO_FOUR, WIDTH, width) if isinstance(width, int) else width
        for name, width in widths.items()
    }


def attention(s: Around, x: Tensor) -> Tensor:
    """Grouped queries, each head in its own columns, by views that need the memory."""
    q, k, v = (each.view(len(x), -1, 4).transpose(0, 1) for each in (s.q(x), s.k(x), s.v(x)))
    k, v = (each.repeat_interleave(2, 0) for each in (k, v))
    return s.o(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))


def gated(s: Around, x: Tensor) -> Tensor:
    return s.down(F.silu(s.gate(x)) * s.up(x))


def projections() -> Around:
    return Around(attention, **linears(q=WIDTH, k=HALF, v=HALF, o=WIDTH)).eval()


def mlp(forward: Callable[..., object] = gated, **others: int | nn.Module) -> Around:
    parts = linears(**{"gate": WIDTH, "up": WIDTH, "down": WIDTH, **others})
    return Around(forward, **parts).eval()


def test_golden_projections() -> None:
    gm, _, counts = after(projections(), passes()[:-1])
    assert counts["merge_projections"] == 1
    assert_golden("passes/merge_projections.txt", text(gm))
    assert_same_numbers(gm, projections())
    _check_stamps(gm)


def test_golden_gated_mlp() -> None:
    gm, _, counts = after(mlp(), passes()[:-1])
    assert counts["fuse_gated_mlp"] == 1
    assert_golden("passes/fuse_gated_mlp.txt", text(gm))
    assert_same_numbers(gm, mlp())
    _check_stamps(gm)


def _check_stamps(gm: torch.fx.GraphModule) -> None:
    made = [
        n
        for n in gm.graph.nodes
        if n.meta.get("sparsefx") in ("merge_projections", "fuse_gated_mlp")
    ]
    assert made
    for node in made:
        if node.op == "call_function":
            assert "forward" in node.meta["stack_trace"]
            assert isinstance(node.meta["val"], Tensor)


def test_each_layer_keeps_a_row_with_its_share() -> None:
    _, ctx, counts = after(projections(), passes())
    assert counts["lower"] == 2
    rows = {row.name: row for row in ctx.rows.values() if row.op == "linear"}
    assert {name: row.merged for name, row in rows.items()} == {
        "q": "k, v", "k": "q, v", "v": "q, k", "o": "",
    }  # fmt: skip
    assert [rows[name].dense_us for name in "qkvo"] == [1.0, 0.5, 0.5, 2.0]
    assert [rows[name].sparse_us for name in "qkvo"] == [0.5, 0.25, 0.25, 1.0]
    alone = after(projections(), (*FUSED, passes()[-1]))[1]
    assert [row.stored_bytes for row in rows.values()] == [
        row.stored_bytes for row in alone.rows.values() if row.op == "linear"
    ]
    assert {row.kernel for row in rows.values()} == {"plain_nm"}
    assert sum(not row.violations() for row in rows.values()) == 4
    names = {f"{layer}.{kind}" for layer in "qkv" for kind in ("weight", "bias")}
    assert names | {"o.weight"} <= ctx.baked


MERGED: dict[str, tuple[Callable[..., object], dict[str, int | nn.Module], int]] = {
    "two of one size": (lambda s, x: (s.a(x), s.b(x)), {"a": 16, "b": 16}, 1),
    "keys and values of a cross-attention": (
        lambda s, x: s.q(x + 1) @ s.k(x).t() @ s.v(x),
        {"q": 16, "k": 16, "v": 16},
        1,
    ),
    "one weight in two calls": (lambda s, x: (s.a(x), s.a(x).sin(), s.a(x + 1)), {"a": 16}, 1),
    "without bias": (
        lambda s, x: (s.a(x), s.b(x)),
        {"a": sparse(TWO_FOUR, bias=False), "b": sparse(TWO_FOUR, bias=False)},
        1,
    ),
    "of two inputs": (lambda s, x: (s.a(x), s.b(x + 1)), {"a": 16, "b": 8}, 0),
    "twice": (
        lambda s, x: (lambda y: (s.a(x), s.b(x), s.a(y), s.b(y)))(x * 2),
        {"a": 16, "b": 8},
        2,
    ),
    "bias in one only": (
        lambda s, x: (s.a(x), s.b(x)),
        {"a": 16, "b": sparse(TWO_FOUR, bias=False)},
        0,
    ),
    "other patterns": (
        lambda s, x: (s.a(x), s.b(x), s.c(x)),
        {"a": 16, "b": sparse(NM(1, 4)), "c": sparse(Unstructured(0.75))},
        0,
    ),
    "what takes something in": (lambda s, x: (F.relu(s.a(x)), s.b(x)), {"a": 16, "b": 16}, 0),
    "alone": (lambda s, x: s.a(x), {"a": 16}, 0),
}


@pytest.mark.parametrize("name", MERGED)
def test_which_projections_are_merged(name: str) -> None:
    forward, widths, count = MERGED[name]
    model = Around(forward, **linears(**widths)).eval()
    gm, ctx, counts = after(model, passes())
    assert counts["merge_projections"] == count
    torch.testing.assert_close(gm(x_of()), model(x_of()), rtol=1e-12, atol=1e-12)
    assert all(row.kernel or row.reason for row in ctx.rows.values())


def test_bitmaps_are_merged_and_take_their_row_pointers_along() -> None:
    parts = {
        name: sparse(Unstructured(0.75), WIDTH, width)
        for name, width in zip("ab", (16, 8), strict=True)
    }
    model = Around(lambda s, x: (s.a(x), s.b(x)), **parts).eval()
    gm, _, counts = after(model, passes(accept, PlainNM(layout="bitmap"))[:-1])
    assert counts["merge_projections"] == 1
    assert calls(gm).count("sparsefx.bitmap_linear.default") == 1
    torch.testing.assert_close(gm(x_of()), model(x_of()), rtol=1e-12, atol=1e-12)


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


FUSES: dict[str, tuple[Callable[..., object], str]] = {
    "silu": (gated, "gate_silu"),
    "relu": (lambda s, x: s.down(F.relu(s.gate(x)) * s.up(x)), "gate_relu"),
    "gelu": (lambda s, x: s.down(F.gelu(s.gate(x)) * s.up(x)), "gate_gelu"),
    "gelu tanh": (
        lambda s, x: s.down(F.gelu(s.gate(x), approximate="tanh") * s.up(x)),
        "gate_gelu_tanh",
    ),
    "up first": (lambda s, x: s.down(s.up(x) * F.silu(s.gate(x))), "gate_silu"),
    "gate called last": (
        lambda s, x: (lambda u: s.down(F.silu(s.gate(x)) * u))(s.up(x)),
        "gate_silu",
    ),
    "steps behind": (
        lambda s, x: s.down((F.silu(s.gate(x)) * s.up(x)) * 0.5 * (x + 1) + x),
        "gate_silu;scale 0.5;mul 0;add 1",
    ),
    "another activation": (lambda s, x: s.down(quick_gelu(s.gate(x)) * s.up(x)), ""),
    "gate read twice": (
        lambda s, x: (lambda g: s.down(g * s.up(x)) + g)(F.silu(s.gate(x))),
        "",
    ),
    "two inputs": (lambda s, x: s.down(F.silu(s.gate(x)) * s.up(x + 1)), ""),
    "no activation": (lambda s, x: s.down(s.gate(x) * s.up(x)), ""),
    "squared": (lambda s, x: s.down(F.silu(s.gate(x)) * s.gate(x)), "gate_silu"),
}


@pytest.mark.parametrize("name", FUSES)
def test_which_mlps_are_fused(name: str) -> None:
    forward, epilogue = FUSES[name]
    model = mlp(forward)
    gm, _, counts = after(model, passes()[:-1])
    assert counts["fuse_gated_mlp"] == bool(epilogue)
    found = {str(n.args[-2]) for n in gm.graph.nodes if "nm_linear" in str(n.target)}
    assert not epilogue or epilogue in found
    assert_same_numbers(gm, model)
    gm, ctx, _ = after(model, passes())
    assert_same_numbers(gm, model)
    assert all(row.kernel for row in ctx.rows.values())


def test_gate_and_up_of_unlike_sizes_or_patterns_stay_two() -> None:
    for other in (sparse(NM(1, 4)), sparse(TWO_FOUR, bias=False), sparse(Unstructured(0.75))):
        gm, _, counts = after(mlp(up=other), passes())
        assert counts["fuse_gated_mlp"] == 0
        assert_same_numbers(gm, mlp(up=other))


def slow_if_stacked(rows: int) -> Callable[..., Verdict]:
    """A guard by which a kernel of `rows` rows of W beats dense and is slower than its parts."""

    def judge(spec: LinearSpec, weight: Tensor, bias: Tensor | None, lowering: Lowering) -> Verdict:
        return Verdict(9.0, 8.0 if spec.out_features == rows else 1.0, "modelled")

    return judge


@pytest.mark.parametrize("model", [projections, mlp])
@pytest.mark.parametrize("judge", [slow_if_stacked(2 * WIDTH), refuse], ids=["slower", "dense"])
def test_what_does_not_win_comes_out_as_if_it_had_not_been_tried(
    model: Callable[[], Around], judge: Callable[..., Verdict]
) -> None:
    gm, ctx, counts = after(model(), passes(judge))
    assert counts["merge_projections"] == counts["fuse_gated_mlp"] == 0
    plainly, expected, _ = after(model(), (*FUSED, passes(judge)[-1]))
    assert text(gm) == text(plainly)
    assert ctx.rows == expected.rows
    assert ctx.baked == expected.baked and ctx.merged == {}
    assert len(ctx.weights._packed) == len(expected.weights._packed), "a stack is kept in memory"


def test_the_question_is_asked_once_for_layers_of_one_shape() -> None:
    asked: list[int] = []

    def judge(spec: LinearSpec, weight: Tensor, bias: Tensor | None, lowering: Lowering) -> Verdict:
        asked.append(spec.out_features)
        return accept(spec, weight, bias, lowering)

    parts = linears(a=WIDTH, b=WIDTH)
    model = Around(lambda s, x: [(s.a(y), s.b(y)) for y in (x, x + 1, x + 2)], **parts).eval()
    _, _, counts = after(model, passes(judge))
    assert counts["merge_projections"] == 3
    assert sorted(asked) == [WIDTH, WIDTH, *[2 * WIDTH] * 4]


def test_without_proof_a_kernel_that_takes_the_stack_is_enough() -> None:
    _, _, counts = after(projections(), passes(slow_if_stacked(2 * WIDTH), proof=False))
    assert counts["merge_projections"] == 1
    refusing = passes(accept, PlainNM(refuses="not today"), proof=False)
    assert after(projections(), refusing)[2]["merge_projections"] == 0


def test_packed_tensors_of_the_parts_are_let_go_and_the_stack_is_packed_once() -> None:
    model, ctx = projections(), PassContext()
    gm = capture(model, (x_of(),))
    run(gm, passes()[:-1], ctx)
    assert sorted(key[1] for key in ctx.weights._packed) == [
        repr(Packing("nm", n=2, m=4)),
        f"{Packing('nm', n=2, m=4)!r} stacked",
    ]
    again = PassContext(weights=ctx.weights)
    other = capture(model, (x_of(5, WIDTH),))
    run(other, passes()[:-1], again)
    names = ("q.weight_merged_values", "q.weight_merged_index")
    assert all(gm.get_buffer(name) is other.get_buffer(name) for name in names)


@torch.library.custom_op("sparsefx_tests::stir", mutates_args={"x"})
def stir(x: Tensor) -> None:
    x.add_(1)


@pytest.mark.parametrize("model", [projections, mlp])
def test_nothing_moves_past_a_change_of_the_input(model: Callable[[], Around]) -> None:
    gm = capture(model(), (x_of(),))
    second = [n for n in gm.graph.nodes if n.target is torch.ops.aten.linear.default][1]
    (x,) = gm.graph.find_nodes(op="placeholder")
    with gm.graph.inserting_before(second):
        gm.graph.call_function(torch.ops.sparsefx_tests.stir.default, (x,))
    gm.recompile()
    expected = gm(x_of().clone())
    counts = run(gm, passes(), PassContext())
    assert counts["fuse_gated_mlp"] == 0
    torch.testing.assert_close(gm(x_of().clone()), expected, rtol=1e-12, atol=1e-12)


def test_the_batch_may_vary() -> None:
    def forward(s: Around, x: Tensor) -> Tensor:
        y = torch.cat((s.q(x).view(-1, 8), s.k(x).view(-1, 8)))  # which strides would not bear
        return y.sum(0) + F.silu(s.gate(x)).mul(s.up(x)).sum()

    model = Around(forward, **linears(q=WIDTH, k=HALF, gate=WIDTH, up=WIDTH)).eval()
    gm = capture(model, (x_of(2, 3, WIDTH),), dynamic_shapes=(({0: torch.export.Dim("batch")},),))
    counts = run(gm, passes(), PassContext())
    assert (counts["merge_projections"], counts["fuse_gated_mlp"]) == (1, 1)
    for rows in (2, 5):
        assert_same_numbers(gm, model, x_of(rows, 3, WIDTH))


class Block(nn.Module):
    """Projections and a gated MLP of float32, as kernels take them."""

    def __init__(self) -> None:
        super().__init__()
        for name, module in linears(q=16, k=8, gate=16, up=16, down=16).items():
            setattr(self, name, module.float())

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.q(x) - self.k(x).repeat(1, 2)
        return self.down(F.silu(self.gate(mixed)) * self.up(mixed))


@torch.no_grad()
def test_through_dynamo_and_a_changed_weight_or_bias_is_noticed() -> None:
    model, x = Block().eval(), x_of().float()
    compiler = eager_compiler("stacked")
    fast = torch.compile(model, backend=compiler)
    changes: list[Callable[[], object]] = [
        lambda: None,
        lambda: model.k.weight.mul_(2),
        lambda: model.up.weight.mul_(0.5),
        lambda: model.up.bias.add_(1),
        lambda: model.q.bias.zero_(),
        lambda: setattr(model.gate, "weight", nn.Parameter(model.gate.weight * 3)),
    ]
    for number, change in enumerate(changes, 1):
        change()
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
        graph = compiler.session.graphs[-1]
        assert graph.counts["merge_projections"] == graph.counts["fuse_gated_mlp"] == 1
        assert len(compiler.session.graphs) == number
    rows = {row.name: row for row in compiler.session.report().rows}
    assert (rows["k"].merged, rows["up"].merged, rows["down"].merged) == ("q", "gate", "")
    assert compiler.session.report().check() == []


def test_training_and_export_leave_the_layers_apart() -> None:
    model, x = Block(), x_of().float()
    compiler = eager_compiler("trained")
    torch.compile(model, backend=compiler)(x).sum().backward()
    assert model.up.weight.grad is not None
    assert "merge_projections" not in compiler.session.graphs[0].counts
    assert {"merge_projections", "fuse_gated_mlp"}.isdisjoint(p.name for p in pipelines.packing())


@torch.no_grad()
def test_by_real_kernels_and_inductor() -> None:
    model, x = Block().eval(), x_of().float()
    fast = sparsefx.compile(model, guard="off")
    torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    report = sparsefx.explain(fast)
    assert {row.name for row in report.rows if row.merged} == {"q", "k", "gate", "up"}
    assert "cpp_nm_linear with k" in str(report).replace("\n", " ")
