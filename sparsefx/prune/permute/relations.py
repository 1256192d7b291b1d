"""What an operator says about the order of channels in its operands and its result.

*Tie*: the operator acts alike on every index of an axis, as einsum does on every letter. Axes of
one letter can be permuted together, and then the result is permuted, or unchanged where the letter
is summed over.

*Move*: the operator only puts elements elsewhere (view, transpose, slice, cat, expand, ...).
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.node import Argument

from sparsefx.candidates import module_path
from sparsefx.rewrite import Decline, tensor_of
from sparsefx.shapes import hint

Letters = tuple[int | str | None, ...]
"""One for each axis; None: an axis along which nothing is known."""


@dataclass(frozen=True)
class Tie:
    """Tensors whose axes of one letter share an order; `members`: each node with its letters."""

    members: tuple[tuple[fx.Node, Letters], ...]


@dataclass(frozen=True)
class Move:
    """`target` holds elements of `source`.

    forward: labels of the source -> of the target, NONE where the element is from elsewhere;
    backward: labels of the target -> of the source, NONE where the target does not have it.
    """

    source: fx.Node
    target: fx.Node
    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor], Tensor]


Relations = tuple[Tie | Move, ...] | Decline
"""Of one operator; Decline: channels that reach it must stay where they are."""


def tie(*members: tuple[Argument, Letters]) -> Relations:
    """The Tie of those members that are tensors."""
    tensors = ((each, letters) for each, letters in members if isinstance(each, fx.Node))
    return (Tie(tuple((node, letters) for node, letters in tensors if holds_tensor(node))),)


def holds_tensor(node: fx.Node) -> bool:
    """Whether its value is one tensor."""
    return isinstance(node.meta.get("val"), Tensor)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Its sizes at the example input."""
    return tuple(hint(size) for size in tensor_of(node).shape)


def aligned(operand: fx.Node, result: tuple[int, ...]) -> Letters:
    """Letters of an operand that is broadcast to the shape `result`, whose letters are its axes."""
    shape = shape_of(operand)
    skip = len(result) - len(shape)
    return tuple(
        skip + axis if size == result[skip + axis] else None for axis, size in enumerate(shape)
    )


def unknown(node: fx.Node, how: str = "") -> Decline:
    """No order may change across `node`."""
    target = node.target
    name = target._schema.name.removeprefix("aten::") if isinstance(target, OpOverload) else target
    return Decline(f"its channels go through {how}{name} in {module_path(node)}")
