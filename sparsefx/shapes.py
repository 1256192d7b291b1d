"""Symbolic sizes, read without installing a guard."""

import torch


def hint(size: int | torch.SymInt) -> int:
    """The size at the example input; 1 where a symbol has none."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else 1


def varies(size: int | torch.SymInt) -> bool:
    """Whether other calls of the same graph may bring another size."""
    return isinstance(size, torch.SymInt) and not bool(size.node.expr.is_number)


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
