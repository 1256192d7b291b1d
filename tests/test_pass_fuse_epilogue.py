"""What is fused into a packed linear, what is not, and that nothing moves past a change."""

import operator
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparsefx.graph import capture
from sparsefx.pipeline import PassContext, run
from tests.pass_models import (
    FUSED,
    WIDTH,
    Around,
    after,
    assert_same_numbers,
    one,
    x_of,
)

FUSES: dict[str, tuple[Callable[..., object], int, str]] = {
    "relu": (lambda s, x: F.relu(s.l(x)), 1, "relu"),
    "silu": (lambda s, x: F.silu(s.l(x)), 1, "silu"),
    "gelu": (lambda s, x: F.gelu(s.l(x)), 1, "gelu"),
    "gelu none": (lambda s, x: F.gelu(s.l(x), approximate="none"), 1, "gelu"),
    "gelu tanh": (lambda s, x: F.gelu(s.l(x), approximate="tanh"), 1, "gelu_tanh"),
    "scale": (lambda s, x: s.l(x) * 3, 1, "scale 3.0"),
    "divide": (lambda s, x: s.l(x) / 4, 1, "scale 0.25"),
    "left of a plus": (lambda s, x: s.l(x) + x, 1, "add 0"),
    "right of a plus": (lambda s, x: x + s.l(x), 1, "add 0"),
    "right of a times": (lambda s, x: x * s.l(x), 1, "mul 0"),
    "behind a dropout": (lambda s, x: x + F.dropout(s.l(x), 0.1, training=False), 1, "add 0"),
    "behind a dropout in place": (lambda s, x: F.dropout(s.l(x), 0.1, False, True) + x, 1, "add 0"),
    "alpha 1": (lambda s, x: torch.add(s.l(x), x, alpha=1), 1, "add 0"),
    "a chain": (
        lambda s, x: x + F.silu(s.l(x) * 0.5) * (x + 1),
        4,
        "scale 0.5;silu;mul 0;add 1",
    ),
    "two linears": (lambda s, x: F.silu(s.l(x)) * s.l(x + 1), 2, "mul 0"),
}


@pytest.mark.parametrize("name", FUSES)
def test_what_is_fused(name: str) -> None:
    forward, count, epilogue = FUSES[name]
    model = one(forward)
    gm, _, counts = after(model, FUSED)
    assert counts["fuse_epilogue"] == count
    packed = [n for n in gm.graph.nodes if n.target is torch.ops.sparsefx.nm_linear.default]
    assert packed[-1].args[-2] == epilogue
    assert_same_numbers(gm, model)


ROW, CUBE = x_of(WIDTH), x_of(2, 3, WIDTH)
NOT_FUSED: dict[str, Callable[..., object]] = {
    "two users": lambda s, x: (lambda y: F.relu(y) + y.sum())(s.l(x)),
    "squared": lambda s, x: (lambda y: y * y)(s.l(x)),
    "operand of one row": lambda s, x: s.l(x) + s.row,
    "operand that broadcasts the linear": lambda s, x: s.l(x) + s.cube,
    "operand of one column": lambda s, x: s.l(x) * x[:, :1],
    "operand of another dtype": lambda s, x: s.l(x) + x.float(),
    "alpha 2": lambda s, x: torch.add(s.l(x), x, alpha=2),
    "the minus of an add": lambda s, x: torch.add(x, s.l(x), alpha=-1),
    "divided by the linear": lambda s, x: 2 / (s.l(x).square() + 1),
    "divided by a tensor": lambda s, x: s.l(x) / (x.abs() + 1),
    "divided by zero": lambda s, x: s.l(x) / 0,
    "rounding division": lambda s, x: torch.div(s.l(x), 2, rounding_mode="floor"),
    "plus a number": lambda s, x: s.l(x) + 1,
    "a view between": lambda s, x: F.relu(s.l(x).view(4, 12)),
    "behind an active dropout": lambda s, x: F.dropout(s.l(x), 1.0, training=True) + x,
    "another activation": lambda s, x: torch.tanh(s.l(x)),
}


@pytest.mark.parametrize("name", NOT_FUSED)
def test_what_is_not_fused(name: str) -> None:
    model = one(NOT_FUSED[name], row=nn.Parameter(ROW), cube=nn.Parameter(CUBE))
    gm, _, counts = after(model, FUSED)
    assert counts["pack_nm"] == 1
    assert counts["fuse_epilogue"] == 0
    assert_same_numbers(gm, model)


def in_between(*lines: Callable[[fx.Graph, fx.Node], object]) -> Around:
    """y = linear(x); the lines; relu(y), as a graph that is not functional."""

    def forward(s: Around, x: Tensor) -> Tensor:
        return F.relu(s.l(x))

    model = one(forward)
    gm = capture(model, (x_of(),))
    (relu,) = (n for n in gm.graph.nodes if n.target is torch.ops.aten.relu.default)
    (x,) = gm.graph.find_nodes(op="placeholder")
    with gm.graph.inserting_before(relu):
        for line in lines:
            line(gm.graph, x)
    gm.recompile()
    return gm


@torch.library.custom_op("sparsefx_tests::bump", mutates_args={"x"})
def bump(x: Tensor) -> None:
    x.add_(1)


BARRIERS: dict[str, Callable[[fx.Graph, fx.Node], object]] = {
    "a method": lambda g, x: g.call_method("add_", (x, 1)),
    "an overload": lambda g, x: g.call_function(torch.ops.aten.add_.Tensor, (x, 1)),
    "a packet": lambda g, x: g.call_function(torch.ops.aten.add_, (x, 1)),
    "a custom operator": lambda g, x: g.call_function(torch.ops.sparsefx_tests.bump, (x,)),
    "an assignment": lambda g, x: g.call_function(operator.setitem, (x, 0, 1.0)),
    "an operator": lambda g, x: g.call_function(operator.iadd, (x, 1)),
    "out=": lambda g, x: g.call_function(torch.add, (x, 1), {"out": x}),
    "inplace=": lambda g, x: g.call_function(F.elu, (x,), {"inplace": True}),
    "inplace by position": lambda g, x: g.call_function(F.leaky_relu, (x, 0.5, True)),
}


@pytest.mark.parametrize("name", BARRIERS)
def test_nothing_moves_past_a_change_in_place(name: str) -> None:
    gm = in_between(BARRIERS[name])
    x = x_of()
    expected = gm(x.clone())
    counts = run(gm, FUSED, PassContext())
    assert (counts["pack_nm"], counts["fuse_epilogue"]) == (1, 0)
    torch.testing.assert_close(gm(x.clone()), expected, rtol=1e-12, atol=1e-12)


def test_nothing_moves_out_of_autocast() -> None:
    gm = in_between(lambda g, x: g.call_function(torch.amp.autocast_mode._exit_autocast, (x,)))
    assert run(gm, FUSED, PassContext())["fuse_epilogue"] == 0


HARMLESS: dict[str, Callable[[fx.Graph, fx.Node], object]] = {
    "a method": lambda g, x: g.call_method("add", (x, 1)),
    "inplace=False": lambda g, x: g.call_function(F.elu, (x,), {"inplace": False}),
    "inplace by position": lambda g, x: g.call_function(F.leaky_relu, (x, 0.5, False)),
    "a packet": lambda g, x: g.call_function(torch.ops.aten.relu, (x,)),
    "double underscores": lambda g, x: g.call_method("__len__", (x,)),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_other_nodes_between_do_not_matter(name: str) -> None:
    gm = in_between(HARMLESS[name])
    assert run(gm, FUSED, PassContext())["fuse_epilogue"] == 1
