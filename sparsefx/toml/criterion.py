"""A criterion as TOML: its name, or a table where it has options.

criterion = "wanda"
criterion = { method = "sparsegpt", damp = 0.01, block = 128 }
criterion = { method = "dsnot", start = "wanda" }      # what is left out has its default
"""

from collections.abc import Callable, Mapping
from dataclasses import fields

from sparsefx.criteria import (
    Criterion,
    DSnoT,
    Magnitude,
    Random,
    Reconstruct,
    SparseGPT,
    Wanda,
)
from sparsefx.errors import InvalidCriterion

_METHODS: dict[str, Callable[..., Criterion]] = {
    "magnitude": Magnitude,
    "random": Random,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "dsnot": DSnoT,
    "reconstruct": Reconstruct,
}


def criterion_entry(criterion: Criterion) -> str | dict[str, object]:
    """What `parse_criterion` reads."""
    method = type(criterion).__name__.lower()
    values = {field.name: getattr(criterion, field.name) for field in fields(criterion)}
    if not values:
        return method
    written = {
        name: criterion_entry(value) if isinstance(value, Criterion) else value
        for name, value in values.items()
    }
    return {"method": method, **written}


def parse_criterion(given: object) -> Criterion:
    """The criterion of a TOML value. Raises InvalidCriterion."""
    table = given if isinstance(given, Mapping) else {"method": given}
    method = table.get("method")
    if not isinstance(method, str) or method not in _METHODS:
        rule = f"it is not one of {', '.join(_METHODS)}"
        raise InvalidCriterion(criterion=f"criterion {method!r}", rule=rule)
    make = _METHODS[method]
    options = {name: value for name, value in table.items() if name != "method"}
    known = [field.name for field in fields(make)]  # type: ignore[arg-type]  # all are dataclasses
    for name in options:
        if name not in known:
            rule = f"{name!r} is not an option; there are: {', '.join(known) or 'none'}"
            raise InvalidCriterion(criterion=method, rule=rule)
    if "start" in options:
        options["start"] = parse_criterion(options["start"])
    return make(**options)
