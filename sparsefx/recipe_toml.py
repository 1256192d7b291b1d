"""A recipe as TOML: [[weights]] and [[attention]], an entry for each glob.

    [[weights]]                        [[attention]]
    match = "*.mlp.*"                  match = "*.layers.1?.self_attn"
    pattern = "nm"                     method = "skip_softmax"     # or "theta", "dense"
    n = 2                              sparsity = 0.7
    m = 4                              tile = [64, 64]

A plain [attention] table, without match, is for every attention.
"""

import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path

import tomli_w

from sparsefx.attention.spec import AttentionPattern, SkipSoftmax, Theta
from sparsefx.errors import InvalidRecipe, InvalidThreshold
from sparsefx.patterns import NM, Block, Pattern, Unstructured

Weights = Mapping[str, Pattern | None]
Attention = AttentionPattern | Mapping[str, AttentionPattern | None] | None


def dumps(weights: Weights, attention: Attention) -> str:
    """The text that `loads` reads. Raises InvalidRecipe for a metric, which is no data."""
    table: dict[str, object] = {}
    if isinstance(attention, Mapping):
        table["attention"] = [{"match": glob, **_method(p)} for glob, p in attention.items()]
    elif attention is not None:
        table["attention"] = _method(attention)
    table["weights"] = [{"match": glob, **_entry(pattern)} for glob, pattern in weights.items()]
    return tomli_w.dumps(table)


def loads(content: bytes, path: str | Path) -> tuple[dict[str, Pattern | None], Attention]:
    """The weights and the attention of a recipe; `path` is named in errors.

    Raises InvalidRecipe, and InvalidPattern for a pattern whose numbers make no sense.
    """
    try:
        table = tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:  # tomllib on bad syntax, UTF-8, digits, depth
        raise _invalid(path, f"not TOML: {error}") from error
    unknown = set(table) - {"weights", "attention"}
    if unknown:
        rule = f"unknown section {sorted(unknown)[0]!r}, known: weights, attention"
        raise _invalid(path, rule)
    entries = _entries(path, "weights", table.get("weights", []))
    weights = {glob: _parse_entry(path, entry) for glob, entry in entries.items()}
    attention = table.get("attention")
    if attention is None:
        return weights, None
    if isinstance(attention, dict):
        return weights, _parse_method(path, "[attention]", attention)
    entries = _entries(path, "attention", attention)
    return weights, {
        glob: _parse_method(path, f"[[attention]] {glob!r}", entry)
        for glob, entry in entries.items()
    }


def _entries(path: str | Path, section: str, given: object) -> dict[str, dict[str, object]]:
    """match -> the other keys of each [[section]] entry."""
    if not isinstance(given, list):
        raise _invalid(path, f"{section} must be an array of tables, [[{section}]]")
    entries: dict[str, dict[str, object]] = {}
    for entry in given:
        glob = entry.get("match") if isinstance(entry, dict) else None
        if not isinstance(glob, str):
            raise _invalid(path, f"each [[{section}]] entry needs match = '<glob>'")
        if glob in entries:
            raise _invalid(path, f"two [[{section}]] entries have the same match {glob!r}")
        entries[glob] = {key: value for key, value in entry.items() if key != "match"}
    return entries


_KINDS: dict[str, Callable[..., Pattern] | None] = {
    "unstructured": Unstructured,
    "nm": NM,
    "block": Block,
    "dense": None,
}
_NUMBERS = {"unstructured": ("sparsity",), "nm": ("n", "m"), "block": ("rows", "cols", "sparsity")}


def _entry(pattern: Pattern | None) -> dict[str, object]:
    if pattern is None:
        return {"pattern": "dense"}
    kind = type(pattern).__name__.lower()
    numbers = {name: getattr(pattern, name) for name in _NUMBERS[kind]}
    return {"pattern": kind, **numbers, "criterion": type(pattern.criterion).__name__.lower()}


def _parse_entry(path: str | Path, entry: Mapping[str, object]) -> Pattern | None:
    kind = entry.get("pattern")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise _invalid(path, f"pattern {kind!r} is not one of {', '.join(_KINDS)}")
    make = _KINDS[kind]
    if make is None:
        return None
    if entry.get("criterion", "magnitude") != "magnitude":
        raise _invalid(path, f"criterion {entry['criterion']!r} is not one of magnitude")
    numbers = {name: entry.get(name) for name in _NUMBERS[kind]}
    extra = set(entry) - {"pattern", "criterion", *numbers}
    legal = {"sparsity": _is_real}
    if extra or not all(legal.get(name, _is_whole)(value) for name, value in numbers.items()):
        raise _invalid(path, f"pattern {kind!r} takes the numbers {', '.join(numbers)}")
    return make(**numbers)


def _is_whole(value: object) -> bool:
    """Whole numbers of TOML have 64 bits; those of tomllib have no limit."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_real(value: object) -> bool:
    """A finite number; false for NaN, which compares false."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max  # type: ignore[arg-type]  # is_number


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_tile(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_whole, value))


def _is_factor(value: object) -> bool:
    pair = isinstance(value, list) and len(value) == 2 and all(map(_is_real, value))
    return pair or _is_real(value)


# Each key of a method: what its value must be, as a test and in words.
_REAL, _WHOLE, _TEXT = (_is_real, "a number"), (_is_whole, "a whole number"), (_is_text, "text")
_Keys = Mapping[str, tuple[Callable[[object], bool], str]]
_METHODS: dict[str, tuple[type[AttentionPattern], _Keys]] = {
    "skip_softmax": (
        SkipSoftmax,
        {
            "sparsity": _REAL,
            "error": _REAL,
            "scale_factor": (_is_factor, "a number, or [prefill, decode]"),
            "per": _TEXT,
            "order": _TEXT,
            "tile": (_is_tile, "[query rows, keys], two whole numbers"),
            "within": _REAL,
        },
    ),
    "theta": (
        Theta,
        {
            "k": _WHOLE,
            "placement": _TEXT,
            "denominator": _TEXT,
            "v_mean": (_is_bool, "true or false"),
            "dense_k": _WHOLE,
            "dense_layers": _WHOLE,
            "deviations": _REAL,
        },
    ),
}


def _method(pattern: AttentionPattern | None) -> dict[str, object]:
    if pattern is None:
        return {"method": "dense"}
    if isinstance(pattern, SkipSoftmax) and pattern.metric is not None:
        raise InvalidRecipe(
            where="attention",
            rule="its metric is a function, which TOML cannot hold",
            remedy="Write dataclasses.replace(pattern, metric=None), and pass the metric in Python",
        )
    (name,) = (name for name, (kind, _) in _METHODS.items() if isinstance(pattern, kind))
    values = {key: getattr(pattern, key) for key in _METHODS[name][1]}
    written = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in values.items()
        if value is not None
    }
    return {"method": name, **written}


def _parse_method(
    path: str | Path, where: str, entry: Mapping[str, object]
) -> AttentionPattern | None:
    name = entry.get("method")
    if not isinstance(name, str) or name not in (*_METHODS, "dense"):
        known = ", ".join((*_METHODS, "dense"))
        raise _invalid(path, f"{where}: method {name!r} is not one of {known}")
    make, keys = (None, {}) if name == "dense" else _METHODS[name]
    given = {key: value for key, value in entry.items() if key != "method"}
    for key, value in given.items():
        if key not in keys:
            known = ", ".join(keys) or "none"
            raise _invalid(path, f"{where}: {key!r} is not a key of {name}; there are: {known}")
        is_legal, words = keys[key]
        if not is_legal(value):
            raise _invalid(path, f"{where}: {key} = {value!r} must be {words}")
    return None if make is None else _make(path, where, make, given)


def _make(
    path: str | Path, where: str, make: type[AttentionPattern], given: Mapping[str, object]
) -> AttentionPattern:
    needed = {field.name for field in fields(make) if field.default is MISSING}
    if missing := needed - set(given):
        raise _invalid(path, f"{where}: {min(missing)} is missing")
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
    try:
        return make(**values)  # type: ignore[arg-type]  # checked key by key
    except InvalidThreshold as error:
        raise _invalid(path, f"{where}: {error.fields['rule']}") from error


def _invalid(path: str | Path, rule: str) -> InvalidRecipe:
    return InvalidRecipe(where=path, rule=rule, remedy="Recipe.to_toml shows the form")
