"""Whether a node may change one of its inputs in place, or the mode that others run in.

Dynamo graphs are not functional: a KV cache is updated by `index_copy_`, autocast is switched by a
call. A node must not be moved past such a change.
"""

import operator
from types import CodeType

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

_IN_PLACE = frozenset(
    {
        operator.setitem,
        operator.iadd,
        operator.isub,
        operator.imul,
        operator.itruediv,
        operator.ifloordiv,
        operator.imod,
        operator.ipow,
        operator.iand,
        operator.ior,
        operator.ixor,
        operator.imatmul,
        operator.ilshift,
        operator.irshift,
    }
)
_SWITCHES = ("_enter_", "_exit_", "_set_")  # autocast, inference mode, gradients


def mutates(node: fx.Node) -> bool:
    """Whether the node may write to an input, or switch a mode. True where that cannot be told."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if node.op == "call_method":
        return _in_place_name(str(node.target))
    if isinstance(node.target, OpOverload):
        return node.target._schema.is_mutable
    if isinstance(node.target, OpOverloadPacket):
        overloads = (getattr(node.target, name) for name in node.target.overloads())
        return "out" in node.kwargs or any(_writes(overload) for overload in overloads)
    if node.op != "call_function" or isinstance(node.target, HigherOrderOperator):
        return True
    if "out" in node.kwargs or _asks_for_in_place(node):
        return True
    name = str(getattr(node.target, "__name__", ""))  # callable objects have none
    named = _in_place_name(name) or name.startswith(_SWITCHES) or not name
    return node.target in _IN_PLACE or named


def _writes(overload: OpOverload) -> bool:
    """Whether it writes to an input, other than an `out=` that the call does not give."""
    return any(
        argument.alias_info is not None and argument.alias_info.is_write and not argument.is_out
        for argument in overload._schema.arguments
    )


def changed_in_graph(weight: fx.Node) -> bool:
    """Whether a weight, or a view of it, may be written to in its own graph."""
    address = storage_of(weight.meta.get("example_value"))
    views = [weight]
    while views:
        for user in views.pop().users:
            if mutates(user):
                return True
            if address is not None and storage_of(user.meta.get("example_value")) == address:
                views.append(user)
    return False


def storage_of(value: object) -> int | None:
    """Identity of a tensor's storage; fake tensors have one too."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return None
    return int(value.untyped_storage()._cdata)


def _asks_for_in_place(node: fx.Node) -> bool:
    """Whether `inplace` is given as true, by name or by position: F.elu(x, 1.0, True)."""
    code = getattr(node.target, "__code__", None)  # built-in functions have none
    names = code.co_varnames[: code.co_argcount] if isinstance(code, CodeType) else ()
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    return given.get("inplace", False) is not False


def mutates_between(first: fx.Node, last: fx.Node) -> bool:
    """Whether any node strictly between two nodes of one graph may write to an input."""
    node = first.next
    while node is not last:
        if node.op == "root" or mutates(node):
            return True
        node = node.next
    return False


def _in_place_name(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")
