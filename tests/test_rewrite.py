"""What a match expression matches, what a build may answer, and what is erased behind it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from sparsefx.rewrite import (
    Built,
    Call,
    Decline,
    Expression,
    Rule,
    Site,
    Var,
    arguments,
    call,
    match,
    rewrite,
)

aten = torch.ops.aten
add, mul, relu = call(aten.add.Tensor), call(aten.mul.Tensor), call(aten.relu.default)
X, Y = Var("x"), Var("y")
Draw = Callable[[fx.Graph, fx.Node, fx.Node], fx.Node]


def graph_of(draw: Draw) -> fx.GraphModule:
    """A graph of the inputs p and q whose output is what `draw` makes of them."""
    graph = fx.Graph()
    p, q = graph.placeholder("p"), graph.placeholder("q")
    graph.output(draw(graph, p, q))
    return fx.GraphModule(nn.Module(), graph)


def op(graph: fx.Graph, target: object, *args: object, **kwargs: object) -> fx.Node:
    return graph.call_function(target, args, kwargs)  # type: ignore[arg-type]


def last(gm: fx.GraphModule) -> fx.Node:
    node = gm.graph.output_node().args[0]
    assert isinstance(node, fx.Node)
    return node


MATCHES: dict[str, tuple[Draw, Expression, bool]] = {
    "a variable takes a node": (lambda g, p, q: op(g, aten.add.Tensor, p, q), add(X, Y), True),
    "a variable takes a number": (lambda g, p, q: op(g, aten.add.Tensor, p, 2), add(X, Y), True),
    "one variable twice, one node": (
        lambda g, p, q: op(g, aten.add.Tensor, p, p),
        add(X, X),
        True,
    ),
    "one variable twice, two nodes": (
        lambda g, p, q: op(g, aten.add.Tensor, p, q),
        add(X, X),
        False,
    ),
    "one variable at two depths": (
        lambda g, p, q: op(g, aten.add.Tensor, op(g, aten.relu.default, p), p),
        add(relu(X), X),
        True,
    ),
    "one variable at two depths, two nodes": (
        lambda g, p, q: op(g, aten.add.Tensor, op(g, aten.relu.default, p), q),
        add(relu(X), X),
        False,
    ),
    "a default that was left out": (
        lambda g, p, q: op(g, aten.add.Tensor, p, q),
        add(X, Y, 1),
        True,
    ),
    "a keyword": (lambda g, p, q: op(g, aten.add.Tensor, p, q, alpha=2), add(X, Y, 2), True),
    "another literal": (lambda g, p, q: op(g, aten.add.Tensor, p, q, alpha=2), add(X, Y, 1), False),
    "an argument that is not asked for": (
        lambda g, p, q: op(g, aten.add.Tensor, p, q, alpha=2),
        add(X, Y),
        True,
    ),
    "1 is not 1.0": (lambda g, p, q: op(g, aten.add.Tensor, p, 1.0), add(X, 1), False),
    "1 is not True": (lambda g, p, q: op(g, aten.add.Tensor, p, True), add(X, 1), False),
    "a text": (
        lambda g, p, q: op(g, aten.gelu.default, p, approximate="tanh"),
        call(aten.gelu.default)(X, "tanh"),
        True,
    ),
    "another text": (
        lambda g, p, q: op(g, aten.gelu.default, p),
        call(aten.gelu.default)(X, "tanh"),
        False,
    ),
    "None where there is none": (
        lambda g, p, q: op(g, aten.linear.default, p, q),
        call(aten.linear.default)(X, Y, None),
        True,
    ),
    "None where there is one": (
        lambda g, p, q: op(g, aten.linear.default, p, q, q),
        call(aten.linear.default)(X, Y, None),
        False,
    ),
    "another overload": (lambda g, p, q: op(g, aten.add.Scalar, p, 1), add(X, Y), False),
    "another operator inside": (
        lambda g, p, q: op(g, aten.relu.default, op(g, aten.silu.default, p)),
        relu(relu(X)),
        False,
    ),
    "a number where a call is asked for": (
        lambda g, p, q: op(g, aten.add.Tensor, p, 1),
        add(X, relu(Y)),
        False,
    ),
}


@pytest.mark.parametrize("name", MATCHES)
def test_match(name: str) -> None:
    draw, expression, expected = MATCHES[name]
    assert match(expression, last(graph_of(draw)), {}) is expected


def test_bindings_come_under_their_own_names() -> None:
    gm = graph_of(lambda g, p, q: op(g, aten.linear.default, op(g, aten.relu.default, p), q))
    bindings: dict[str, object] = {}
    linear = call(aten.linear.default)
    assert match(linear(relu(Var("inner")), Var("w"), Var("b")), last(gm), bindings)
    p, q = gm.graph.find_nodes(op="placeholder")
    assert bindings == {"inner": p, "w": q, "b": None}


def test_arguments_fills_in_keywords_and_defaults() -> None:
    gm = graph_of(lambda g, p, q: op(g, aten.addmm.default, p, q, mat2=p, alpha=3))
    p, q = gm.graph.find_nodes(op="placeholder")
    assert arguments(last(gm)) == (p, q, p, 1, 3)


def test_call_writes_an_expression() -> None:
    assert add(X, 1) == Call(aten.add.Tensor, (X, 1))


def to_silu(site: Site, x: fx.Node) -> Built:
    return site.call(aten.silu.default, x)


def chain() -> fx.GraphModule:
    """relu(relu(p))."""
    gm = graph_of(lambda g, p, q: op(g, aten.relu.default, op(g, aten.relu.default, p)))
    for node in gm.graph.nodes:
        node.meta["val"] = torch.zeros(2)
        node.meta["note"] = node.name
    return gm


def count_of(gm: fx.GraphModule, rules: tuple[Rule, ...]) -> tuple[int, list[tuple[str, str]]]:
    declined: list[tuple[str, str]] = []
    count = rewrite(gm, rules, "test", lambda node, why: declined.append((node.name, why)))
    gm.graph.lint()
    gm.recompile()
    return count, declined


def test_every_site_is_rewritten_once() -> None:
    gm = chain()
    assert count_of(gm, (Rule(relu(X), to_silu),)) == (2, [])
    x = torch.randn(2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(gm(x, x), torch.nn.functional.silu(torch.nn.functional.silu(x)))


def test_a_nested_match_takes_both_nodes() -> None:
    gm = chain()
    assert count_of(gm, (Rule(relu(relu(X)), to_silu),)) == (1, [])
    assert [node.op for node in gm.graph.nodes].count("call_function") == 1


def test_new_nodes_carry_the_roots_metadata_and_the_authors_name() -> None:
    gm = chain()
    count_of(gm, (Rule(relu(relu(X)), to_silu),))
    assert last(gm).meta["note"] == "relu_default_1"
    assert last(gm).meta["sparsefx"] == "test"


def test_a_decline_is_heard_and_the_next_rule_is_asked() -> None:
    gm = chain()
    no = Rule(relu(X), lambda site, x: Decline("not this one"))
    count, declined = count_of(gm, (no, Rule(relu(relu(X)), to_silu)))
    assert count == 1
    assert declined == [("relu_default", "not this one"), ("relu_default_1", "not this one")]


def test_none_is_no_answer_and_nobody_hears_of_it() -> None:
    gm = chain()
    assert count_of(gm, (Rule(relu(X), lambda site, x: None),)) == (0, [])
    assert [node.op for node in gm.graph.nodes].count("call_function") == 2


def test_the_first_rule_that_builds_wins() -> None:
    gm = chain()
    never = Rule(relu(X), lambda site, x: pytest.fail("asked after another rule had built"))
    assert count_of(gm, (Rule(relu(X), to_silu), never))[0] == 2


def test_a_match_may_be_replaced_by_a_part_of_it() -> None:
    gm = graph_of(lambda g, p, q: op(g, aten.mul.Tensor, p, 1))
    assert count_of(gm, (Rule(mul(X, 1), lambda site, x: x),))[0] == 1
    assert last(gm).op == "placeholder"


ERASES: dict[str, tuple[Draw, int]] = {
    "pure operators, all the way up": (
        lambda g, p, q: op(g, aten.relu.default, op(g, aten.silu.default, p)),
        0,
    ),
    "a diamond, once": (
        lambda g, p, q: (lambda y: op(g, aten.add.Tensor, y, op(g, aten.silu.default, y)))(
            op(g, aten.relu.default, p)
        ),
        0,
    ),
    "a diamond, the other way round": (
        lambda g, p, q: (lambda y: op(g, aten.add.Tensor, op(g, aten.silu.default, y), y))(
            op(g, aten.relu.default, p)
        ),
        0,
    ),
    "not what changes an input": (lambda g, p, q: op(g, aten.relu_.default, p), 1),
    "not what draws random numbers": (lambda g, p, q: op(g, aten.bernoulli.default, p), 1),
    "not what cannot be told": (lambda g, p, q: g.call_method("relu", (p,)), 1),
    "nor a function of the user": (lambda g, p, q: op(g, torch.relu, p), 1),
}


@pytest.mark.parametrize("name", ERASES)
def test_what_a_rewrite_erases(name: str) -> None:
    """The match is mul(<the expression>, q), and q is what replaces it."""
    draw, kept = ERASES[name]
    gm = graph_of(lambda g, p, q: op(g, aten.mul.Tensor, draw(g, p, q), q))
    assert count_of(gm, (Rule(mul(X, Y), lambda site, x, y: y),))[0] == 1
    left = [node for node in gm.graph.nodes if node.op in ("call_function", "call_method")]
    assert len(left) == kept


def test_what_others_still_use_is_kept() -> None:
    def draw(g: fx.Graph, p: fx.Node, q: fx.Node) -> fx.Node:
        y = op(g, aten.relu.default, p)
        return op(g, aten.add.Tensor, op(g, aten.mul.Tensor, y, q), y)

    gm = graph_of(draw)
    assert count_of(gm, (Rule(mul(X, Y), lambda site, x, y: y),))[0] == 1
    x, y = torch.tensor([-1.0, 2.0]), torch.tensor([10.0, 10.0])
    assert torch.equal(gm(x, y), torch.tensor([10.0, 12.0]))


def constants(*values: Tensor) -> list[str]:
    """Names under which one site keeps these tensors, each asked for as a.w."""
    gm = chain()
    site = Site(gm, last(gm), "test")
    nodes = [site.constant("a.w", value) for value in values]
    for node, value in zip(nodes, values, strict=True):
        assert torch.equal(gm.get_buffer(str(node.target)), value)
        assert node.meta["val"] is value
    return [str(node.target) for node in nodes]


def test_constants_share_a_name_only_if_they_are_equal() -> None:
    a, b = torch.ones(2), torch.zeros(2)
    assert constants(a, a, a.clone()) == ["a.w", "a.w", "a.w"]
    assert constants(a, b, a, b) == ["a.w", "a.w_2", "a.w", "a.w_2"]
    assert constants(a, a.double(), torch.ones(3)) == ["a.w", "a.w_2", "a.w_3"]
