"""Symbolic sizes, read without installing a guard."""

import torch

_LARGEST = 2**31


def hint(size: int | torch.SymInt) -> int:
    """The size at the example input; 1 where a symbol has none."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else 1


def varies(size: int | torch.SymInt) -> bool:
    """Whether other calls of the same graph may bring another size."""
    return isinstance(size, torch.SymInt) and not bool(size.node.expr.is_number)


def bounds(size: int | torch.SymInt) -> tuple[int, int]:
    """The least size that calls may bring, at least 1, and the greatest, at most 2^31."""
    if isinstance(size, int) or not varies(size):
        return hint(size), hint(size)
    found = size.node.shape_env.bound_sympy(size.node.expr)
    # Comparisons come first: infinity, which has no int, is a class of torch's own.
    least = 1 if found.lower < 1 else int(found.lower)
    return least, _LARGEST if found.upper >= _LARGEST else int(found.upper)


def always_one(size: int | torch.SymInt) -> bool:
    """Whether every call of the graph has the size 1: as queries, decode."""
    return not varies(size) and hint(size) == 1


def same(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Equal for certain: symbols by expression, without installing a guard."""
    first, second = (
        size if isinstance(size, int) else size.node.expr if varies(size) else hint(size)
        for size in (a, b)
    )
    return bool(first == second)
