"""Match an expression in a graph, build its replacement, or say why not.

    linear, mask = call(aten.linear.default), call(torch.ops.sparsefx.mask.default)
    Rule(linear(Var("x"), mask(Var("w"), Var("keep")), Var("b")), build)

`build(site, x=..., w=..., keep=..., b=...)` gets what the variables stand for under their own names
and returns the new node, a `Decline("reason")`, or None where the site is not this rule's business.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.node import Argument

from sparsefx.attributes import get_tensor, set_tensor


@dataclass(frozen=True)
class Var:
    """Stands for any argument; the same name twice must stand for the same argument."""

    name: str


@dataclass(frozen=True)
class Call:
    """A call of `target` on the given argument expressions; arguments left out match anything."""

    target: OpOverload
    args: "tuple[Expression, ...]"


Expression = Var | Call | int | float | str | bool | None


def call(target: OpOverload) -> "Callable[..., Call]":
    """Lets an operator be written as a function in match expressions."""
    return lambda *args: Call(target, args)


@dataclass(frozen=True)
class Decline:
    """Why a rule leaves a matching site as it is; goes into the report."""

    reason: str


@dataclass(frozen=True)
class Site:
    """Where a rule matched: `gm`, its node `root`, and the name of the pass at work."""

    gm: fx.GraphModule
    root: fx.Node
    author: str

    def call(self, target: OpOverload, *args: Argument) -> fx.Node:
        """A new call before the root, with the root's metadata and the author's stamp."""
        with self.gm.graph.inserting_before(self.root):
            node = self.gm.graph.call_function(target, args)
        node.meta = dict(self.root.meta)
        node.meta["sparsefx"] = self.author
        return node

    def constant(self, name: str, value: Tensor) -> fx.Node:
        """A tensor attribute of the graph module as a node.

        An attribute that exists and holds the same numbers is used again; if it holds others, as a
        buffer of the model may, the new one is called `name_2` and so on.
        """
        name = _free_name(self.gm, name, value)
        set_tensor(self.gm, name, value)
        with self.gm.graph.inserting_before(self.root):
            node = self.gm.graph.get_attr(name)
        node.meta["val"] = value
        node.meta["sparsefx"] = self.author
        return node


def _free_name(gm: fx.GraphModule, name: str, value: Tensor) -> str:
    numbered = (f"{name}_{number}" for number in itertools.count(2))
    return next(each for each in itertools.chain((name,), numbered) if _may_hold(gm, each, value))


def _may_hold(gm: fx.GraphModule, name: str, value: Tensor) -> bool:
    try:
        present = get_tensor(gm, name)
    except AttributeError:  # nothing of that name yet
        return True
    if present is value:
        return True
    alike = present.dtype == value.dtype and present.device == value.device
    return alike and torch.equal(present, value)


Built = fx.Node | Decline | None
Build = Callable[..., Built]


@dataclass(frozen=True)
class Rule:
    """What to match and how to build its replacement."""

    match: Call
    build: Build


def tensor_of(node: object) -> Tensor:
    """The example tensor of an operand that is one; its sizes may be symbols."""
    assert isinstance(node, fx.Node)
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value


def arguments(node: fx.Node) -> tuple[Argument, ...]:
    """The positional arguments of an overload call, with keywords and defaults filled in."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = node.args
    tail = tuple(
        node.kwargs.get(argument.name, argument.default_value) for argument in schema[len(given) :]
    )
    return given + tail


def match(expression: Expression, value: object, bindings: dict[str, object]) -> bool:
    """Whether `value` (a node or a constant) is an instance of `expression`; fills `bindings`."""
    match expression:
        case Var(name):
            return bindings.setdefault(name, value) is value
        case Call(target, args):
            if not isinstance(value, fx.Node) or value.target is not target:
                return False
            return all(match_each(args, arguments(value), bindings))
        case _:
            return type(value) is type(expression) and value == expression


def match_each(
    expressions: Sequence[Expression], values: Sequence[object], bindings: dict[str, object]
) -> Iterable[bool]:
    """Matches argument by argument, lazily."""
    return (match(e, v, bindings) for e, v in zip(expressions, values, strict=False))


def rewrite(
    gm: fx.GraphModule,
    rules: Sequence[Rule],
    author: str,
    declined: Callable[[fx.Node, str], None],
) -> int:
    """Applies the first rule that builds something at each node, in graph order.

    `declined(node, reason)` hears of every Decline. Returns the number of replacements.
    """
    count = 0
    for node in list(gm.graph.nodes):
        if node.op == "call_function" and not node._erased:
            count += _rewrite_at(gm, node, rules, author, declined)
    return count


def _rewrite_at(
    gm: fx.GraphModule,
    node: fx.Node,
    rules: Sequence[Rule],
    author: str,
    declined: Callable[[fx.Node, str], None],
) -> int:
    for rule in rules:
        bindings: dict[str, object] = {}
        if not match(rule.match, node, bindings):
            continue
        built = rule.build(Site(gm, node, author), **bindings)
        if isinstance(built, Decline):
            declined(node, built.reason)
        elif built is not None:
            node.replace_all_uses_with(built)
            erase(gm, node)
            return 1
    return 0


def erase(gm: fx.GraphModule, node: fx.Node) -> None:
    """Removes an unused node, then those of its inputs that only it used and that are pure."""
    inputs = list(node.all_input_nodes)
    gm.graph.erase_node(node)
    for producer in inputs:
        if not producer.users and not producer._erased and _is_pure(producer):
            erase(gm, producer)


def _is_pure(node: fx.Node) -> bool:
    """Whether removing it is safe. Not fx's own test, which calls every method call pure."""
    if node.op == "get_attr":
        return True
    return (
        node.op == "call_function"
        and isinstance(node.target, OpOverload)
        and not node.target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in node.target.tags
    )
