"""How a budget is spread over layers, as a TOML table.

method = "owl"              # uniform, er, erk, owl, globalmagnitude, zerothorder, knapsack, within
spread = 0.08               # what is left out has its default
choices = [{ pattern = "nm", n = 2, m = 4 }, { pattern = "dense" }]     # knapsack
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from sparsefx.allocations import (
    ER,
    ERK,
    OWL,
    Allocation,
    GlobalMagnitude,
    Knapsack,
    Uniform,
    Within,
    ZerothOrder,
)
from sparsefx.errors import InvalidAllocation, InvalidRecipe, UnknownOption
from sparsefx.patterns import Pattern
from sparsefx.toml.pattern import parse_pattern, pattern_entry
from sparsefx.toml.values import invalid

_METHODS: dict[str, type[Allocation]] = {
    kind.__name__.lower(): kind
    for kind in (Uniform, ER, ERK, OWL, GlobalMagnitude, ZerothOrder, Knapsack, Within)
}
_NOT_DATA = {"metric", "drop"}  # a function, and what it is given with


def allocation_entry(allocation: Allocation) -> dict[str, object]:
    """What `parse_allocation` reads. Raises InvalidRecipe for a metric, which is no data."""
    if isinstance(allocation, Within) and allocation.metric is not None:
        raise InvalidRecipe(
            where="allocation",
            rule="its metric is a function, which TOML cannot hold",
            remedy="Write Within(error=...), or pass the metric in Python",
        )
    table: dict[str, object] = {"method": type(allocation).__name__.lower()}
    for field in fields(allocation):
        value = getattr(allocation, field.name)
        if field.name == "choices":
            value = [pattern_entry(choice) for choice in value]
        if value is not None:
            table[field.name] = value
    return table


def parse_allocation(path: str | Path, given: object) -> Allocation:
    """The allocation of a TOML table; `path` is named in errors. Raises InvalidRecipe."""
    if not isinstance(given, Mapping):
        raise invalid(path, "allocation must be a table, [allocation]")
    method = given.get("method")
    if not isinstance(method, str) or method not in _METHODS:
        raise invalid(path, f"[allocation] method {method!r} is not one of {', '.join(_METHODS)}")
    kind = _METHODS[method]
    known = [field.name for field in fields(kind) if field.name not in _NOT_DATA]
    options = {key: value for key, value in given.items() if key != "method"}
    for key in options:
        if key not in known:
            raise invalid(path, f"[allocation] {key!r} is not a key of {method}: {known}")
    if "choices" in options:
        options["choices"] = _choices(path, options["choices"])
    try:
        return kind(**options)
    except InvalidAllocation as error:
        raise invalid(path, f"[allocation] {error.fields['rule']}") from error
    except UnknownOption as error:
        raise invalid(path, f"[allocation] {error}") from error


def _choices(path: str | Path, given: object) -> tuple[Pattern | None, ...]:
    if not isinstance(given, list) or not all(isinstance(each, Mapping) for each in given):
        raise invalid(path, "[allocation] choices must be an array of tables")
    return tuple(parse_pattern(path, each) for each in given)
