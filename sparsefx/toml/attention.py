"""What is asked of an attention, as a TOML table.

method = "skip_softmax"     # or "theta", "dense"
sparsity = 0.7
tile = [64, 64]
"""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path

from sparsefx.attention.spec import AttentionPattern, SkipSoftmax, Theta
from sparsefx.errors import InvalidRecipe, InvalidThreshold
from sparsefx.toml.values import invalid, is_real, is_whole


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_tile(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_whole, value))


def _is_factor(value: object) -> bool:
    pair = isinstance(value, list) and len(value) == 2 and all(map(is_real, value))
    return pair or is_real(value)


# Each key of a method: what its value must be, as a test and in words.
_REAL, _WHOLE, _TEXT = (is_real, "a number"), (is_whole, "a whole number"), (_is_text, "text")
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


def attention_entry(pattern: AttentionPattern | None) -> dict[str, object]:
    """What `parse_attention` reads. Raises InvalidRecipe for a metric, which is no data."""
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


def parse_attention(
    path: str | Path, where: str, entry: Mapping[str, object]
) -> AttentionPattern | None:
    """What a TOML table asks; errors name `path` and `where` in it. Raises InvalidRecipe."""
    name = entry.get("method")
    if not isinstance(name, str) or name not in (*_METHODS, "dense"):
        known = ", ".join((*_METHODS, "dense"))
        raise invalid(path, f"{where}: method {name!r} is not one of {known}")
    make, keys = (None, {}) if name == "dense" else _METHODS[name]
    given = {key: value for key, value in entry.items() if key != "method"}
    for key, value in given.items():
        if key not in keys:
            known = ", ".join(keys) or "none"
            raise invalid(path, f"{where}: {key!r} is not a key of {name}; there are: {known}")
        is_legal, words = keys[key]
        if not is_legal(value):
            raise invalid(path, f"{where}: {key} = {value!r} must be {words}")
    return None if make is None else _make(path, where, make, given)


def _make(
    path: str | Path, where: str, make: type[AttentionPattern], given: Mapping[str, object]
) -> AttentionPattern:
    needed = {field.name for field in fields(make) if field.default is MISSING}
    if missing := needed - set(given):
        raise invalid(path, f"{where}: {min(missing)} is missing")
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
    try:
        return make(**values)  # type: ignore[arg-type]  # checked key by key
    except InvalidThreshold as error:
        raise invalid(path, f"{where}: {error.fields['rule']}") from error
