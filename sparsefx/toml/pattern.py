"""A pattern as a TOML table.

pattern = "nm"                     # or "unstructured", "block", "rows", "columns", "dense"
n = 2
m = 4
criterion = "wanda"                # as in criterion.py; magnitude where left out
values = "int4"                    # or "int8", "int8_dynamic", "fp8"; where left out as they are
group = 128                        # input columns to a scale; where left out that of the kind
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from sparsefx.errors import InvalidCriterion
from sparsefx.patterns import NM, Block, Columns, Pattern, Rows, Unstructured
from sparsefx.toml.criterion import criterion_entry, parse_criterion
from sparsefx.toml.values import invalid, is_real, is_whole

_KINDS: dict[str, Callable[..., Pattern] | None] = {
    "unstructured": Unstructured,
    "nm": NM,
    "block": Block,
    "rows": Rows,
    "columns": Columns,
    "dense": None,
}
_NUMBERS = {
    "unstructured": ("sparsity",),
    "nm": ("n", "m"),
    "block": ("rows", "cols", "sparsity"),
    "rows": ("sparsity",),
    "columns": ("sparsity",),
}


def pattern_entry(pattern: Pattern | None) -> dict[str, object]:
    """What `parse_pattern` reads; None is dense."""
    if pattern is None:
        return {"pattern": "dense"}
    kind = type(pattern).__name__.lower()
    numbers = {name: getattr(pattern, name) for name in _NUMBERS[kind]}
    entry = {"pattern": kind, **numbers, "criterion": criterion_entry(pattern.criterion)}
    if not pattern.values:
        return entry
    group = {} if isinstance(pattern, Block) else {"group": pattern.group}
    return {**entry, "values": pattern.values, **group}


def parse_pattern(path: str | Path, entry: Mapping[str, object]) -> Pattern | None:
    """The pattern of a table; `path` is named in errors. Raises InvalidRecipe, InvalidPattern."""
    kind = entry.get("pattern")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise invalid(path, f"pattern {kind!r} is not one of {', '.join(_KINDS)}")
    make = _KINDS[kind]
    if make is None:
        return None
    try:
        criterion = parse_criterion(entry.get("criterion", "magnitude"))
    except InvalidCriterion as error:
        raise invalid(path, f"{error.fields['criterion']}: {error.fields['rule']}") from error
    numbers = {name: entry.get(name) for name in _NUMBERS[kind]}
    stored = {name: entry[name] for name in ("values", "group") if name in entry}
    if not isinstance(stored.get("values", ""), str) or not is_whole(stored.get("group", 0)):
        raise invalid(path, f"pattern {kind!r} takes values as text and group as a whole number")
    extra = set(entry) - {"pattern", "criterion", *numbers, *stored}
    legal = {"sparsity": is_real}
    if extra or not all(legal.get(name, is_whole)(value) for name, value in numbers.items()):
        raise invalid(path, f"pattern {kind!r} takes the numbers {', '.join(numbers)}")
    return make(**numbers, criterion=criterion, **stored)
