"""How models spell the steps of an attention: one reading for overloads, functions and methods.

`x.transpose(1, 2)`, `torch.transpose(x, 1, 2)` and `aten.transpose.int` are one step here, and so
are `scores += mask` and `scores.add_(mask)`, which change a tensor that nothing else reads.
"""

import operator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.fx.node import Argument

from sparsefx.shapes import hint, same, varies

_SYNONYMS = (
    ("add", ("iadd",)),
    ("sub", ("isub", "subtract")),
    ("mul", ("imul", "multiply")),
    ("div", ("truediv", "itruediv", "true_divide", "divide")),
    ("transpose", ("swapaxes", "swapdims")),
)
_SAME_STEP = {other: name for name, others in _SYNONYMS for other in others}
_CASTS = frozenset({"to", "type", "type_as", "float", "half", "bfloat16", "double", "_to_copy"})
_COPIES = frozenset({"contiguous", "clone"})
_LIBRARIES = (torch, F, operator)


def step(node: fx.Node) -> str:
    """What the node does, as torch calls it: "add", "transpose", ...; "" where it is no such call.

    In-place variants have the name of the others.
    """
    name = _name(node)
    bare = name.removesuffix("_") if not name.startswith("__") else name
    return _SAME_STEP.get(bare, bare)


def _name(node: fx.Node) -> str:
    target = node.target
    if node.op == "call_method":
        return str(target)
    if isinstance(target, OpOverload):
        return target._schema.name.removeprefix("aten::")
    name = str(getattr(target, "__name__", ""))  # callable objects have none
    if target is getattr:
        return name
    known = any(getattr(library, name, None) is target for library in _LIBRARIES)
    return name if node.op == "call_function" and known else ""


def argument(node: fx.Node, position: int, *names: str, default: Argument = None) -> Argument:
    """An argument of a call, however it was given."""
    if len(node.args) > position:
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)


def source(node: fx.Node) -> fx.Node | None:
    """The tensor that a step acts on: its first argument."""
    first = argument(node, 0, "input", "self")
    return first if isinstance(first, fx.Node) and is_tensor(first) else None


def is_tensor(value: object) -> bool:
    """Whether it is a node that holds a tensor."""
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor)


def cast_of(node: fx.Node) -> fx.Node | None:
    """What a change of dtype, or a copy in the same one, is made of; None for other steps."""
    return source(node) if step(node) in _CASTS | _COPIES else None


def number(value: object) -> float | None:
    """The value of a number, or of a constant tensor of one element that is no parameter."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, fx.Node):
        return None
    held = value.meta.get("val")
    if value.op == "get_attr" and isinstance(held, Tensor) and not isinstance(held, nn.Parameter):
        return float(held) if held.numel() == 1 and type(held) is Tensor else None
    if step(value) == "full":
        return number(argument(value, 1, "fill_value"))
    if step(value) in ("tensor", "scalar_tensor"):
        return number(argument(value, 0, "data"))
    return None


def untransposed(node: fx.Node, first: int = -2, second: int = -1) -> fx.Node | None:
    """x where the node is x with two axes exchanged; the last two if none are given."""
    x, rank = source(node), rank_of(node)
    if x is None or rank < 3:
        return None
    first, second = first % rank, second % rank
    if step(node) == "transpose":
        axes = [argument(node, 1, "dim0", "axis0"), argument(node, 2, "dim1", "axis1")]
        swapped = {axis % rank for axis in axes if isinstance(axis, int)}
        return x if swapped == {first, second} else None
    if step(node) == "permute":
        given = node.args[1:] if len(node.args) > 2 else argument(node, 1, "dims")
        order = [axis % rank for axis in given] if isinstance(given, list | tuple) else []
        wanted = list(range(rank))
        wanted[first], wanted[second] = second, first
        return x if order == wanted else None
    is_property = step(node) == "getattr" and node.args[1] == "mT"
    is_last = (first, second) == (rank - 2, rank - 1)
    return x if is_last and (step(node) == "mT" or is_property) else None


def rank_of(node: fx.Node) -> int:
    """Number of axes of a tensor node."""
    return len(node.meta["val"].shape)


@dataclass(frozen=True)
class Repeat:
    """x with each head along `axis` repeated, one after another.

    x: of four axes; nodes: all between x and the result, with that.
    """

    x: fx.Node
    axis: int
    nodes: tuple[fx.Node, ...]

    @property
    def heads(self) -> int | torch.SymInt:
        """How many there were before."""
        size: int | torch.SymInt = self.x.meta["val"].shape[self.axis]
        return size


def repeated_heads(node: fx.Node) -> Repeat | None:
    """x.unsqueeze(axis + 1).expand(...).reshape(...), x[:, :, None].expand(...).reshape(...), or
    x.repeat_interleave(number, axis), read; None for anything else.
    """
    x, inner = source(node), None
    if step(node) in ("reshape", "view", "flatten") and x is not None and rank_of(x) == 5:
        nodes = [node]
        while x is not None and cast_of(x) is not None:  # a copy before the reshape
            nodes, x = [*nodes, x], cast_of(x)
        if x is None or step(x) not in ("expand", "expand_as"):
            return None
        inner = source(x)
        while inner is not None and _keeps_all(inner):
            inner = source(inner)
        return _repeat(node, inner, (*nodes, x)) if inner is not None else None
    if step(node) == "repeat_interleave" and x is not None and rank_of(x) == 4:
        times, axis = argument(node, 1, "repeats"), argument(node, 2, "dim")
        if isinstance(times, int) and isinstance(axis, int):
            return Repeat(x, axis % 4, (node,))
    return None


def _repeat(node: fx.Node, spread: fx.Node, nodes: tuple[fx.Node, ...]) -> Repeat | None:
    """The reading of spread.expand(...).reshape(...) if `spread` is x with a new axis of size 1."""
    x = source(spread)
    if x is None or rank_of(x) != 4 or rank_of(node) != 4 or not _only_adds_an_axis(spread):
        return None
    before, between, after = (each.meta["val"].shape for each in (x, nodes[-1], node))
    for axis in (1, 2):
        others = [size for size in range(4) if size != axis]
        kept = [*range(axis + 1), *range(axis + 2, 5)]
        grown = varies(before[axis]) or varies(between[axis + 1])
        if (
            spread.meta["val"].shape[axis + 1] == 1
            and not grown
            and all(same(between[old], before[new]) for new, old in enumerate(kept))
            and all(same(before[size], after[size]) for size in others)
            and same(after[axis], hint(before[axis]) * hint(between[axis + 1]))
        ):
            return Repeat(x, axis, (*nodes, spread))
    return None


def _keeps_all(node: fx.Node) -> bool:
    """Whether a slice is of everything, as torch.export writes the colons of x[:, :, None]."""
    x = source(node)
    return step(node) == "slice" and x is not None and alike(x, node)


def alike(first: fx.Node, second: fx.Node) -> bool:
    """Whether two tensors certainly have one shape."""
    a, b = first.meta["val"].shape, second.meta["val"].shape
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def _only_adds_an_axis(node: fx.Node) -> bool:
    if step(node) == "unsqueeze":
        return True
    index = argument(node, 1)
    return (
        step(node) == "getitem"
        and isinstance(index, tuple | list)
        and all(each is None or each == slice(None) for each in index)
        and sum(each is None for each in index) == 1
    )
