"""Whether a node may change one of its inputs in place.

Dynamo graphs are not functional: a KV cache is updated by `index_copy_`. A node must not be moved
past such a change.
"""

import operator

from torch import fx
from torch._ops import OpOverload

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
    }
)


def mutates(node: fx.Node) -> bool:
    """Whether the node may write to an input. True where that cannot be told."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if node.op == "call_method":
        return _in_place_name(str(node.target))
    if isinstance(node.target, OpOverload):
        return node.target._schema.is_mutable
    if node.op != "call_function" or node.kwargs.get("inplace") or "out" in node.kwargs:
        return True
    name = str(getattr(node.target, "__name__", ""))  # a higher-order operator has none
    return node.target in _IN_PLACE or _in_place_name(name) or not name


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
