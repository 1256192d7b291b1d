"""Attention thresholds in a sparse checkpoint: JSON in the safetensors metadata, checked on load.

    {"version": 1, "attention": {"model.layers.0.self_attn": {"method": "skip_softmax", ...}}}

A metadata entry of its own, absent where nothing was calibrated: a reader that does not know it
reads the rest of the file as it is meant.
"""

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields

from sparsefx.attention.spec import DENOMINATORS, ORDERS, PLACEMENTS, TILES
from sparsefx.attention.thresholds import AttentionThresholds, SkipThresholds, ThetaThresholds
from sparsefx.checkpoint.layout import BadLayout, strict_json

THRESHOLDS_KEY = "sparsefx_attention"

_VERSION = 1
_MOST_TEXT = 2**25  # characters: 80 layers of 64 heads at 128 lengths, twice over
_MOST = 2**16  # heads of an attention, and lengths of a table
_WHOLE_END = 2**63
_METHODS: dict[str, type[AttentionThresholds]] = {
    "skip_softmax": SkipThresholds,
    "theta": ThetaThresholds,
}
_NAMES = {kind: method for method, kind in _METHODS.items()}


def thresholds_to_json(found: Mapping[str, AttentionThresholds]) -> str:
    """The text that `thresholds_from_json` reads. Raises BadLayout for what it would refuse."""
    entries = {name: {"method": _NAMES[type(t)], **asdict(t)} for name, t in found.items()}
    text = json.dumps({"version": _VERSION, "attention": entries})
    thresholds_from_json(text)
    return text


def thresholds_from_json(text: str) -> dict[str, AttentionThresholds]:
    """Attention name -> its thresholds. Raises BadLayout for anything that `save` cannot write."""
    if len(text) > _MOST_TEXT:
        raise BadLayout(f"its attention thresholds take more than {_MOST_TEXT} characters")
    table = strict_json(text)
    if not isinstance(table, dict) or table.get("version") != _VERSION:
        raise BadLayout(f"its attention thresholds are not of version {_VERSION}")
    entries = table.get("attention")
    if set(table) != {"version", "attention"} or not isinstance(entries, dict):
        raise BadLayout("its attention thresholds have missing or unknown fields")
    return {name: _read(name, entry) for name, entry in entries.items()}


def _read(name: str, entry: object) -> AttentionThresholds:
    method = entry.get("method") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(method, str) or method not in _METHODS:
        raise BadLayout(f"the thresholds of {name} are of no known method")
    if set(entry) != {"method", *(field.name for field in fields(_METHODS[method]))}:
        raise BadLayout(f"the thresholds of {name} have missing or unknown fields")
    try:
        return _skip(entry) if method == "skip_softmax" else _theta(entry)
    except _Refused as refused:
        raise BadLayout(f"the thresholds of {name}: {refused}") from refused


class _Refused(ValueError):
    """A field that breaks a rule; the text says which."""


def _skip(entry: Mapping[str, object]) -> SkipThresholds:
    prefill = _numbers("prefill", entry["prefill"], least=0.0)
    tile = _pair("tile", entry["tile"], 1)
    if any(size not in TILES for size in tile):
        raise _Refused(f"tile is {tile!r}")
    shares, errors = _measured("skipped", entry["skipped"]), _measured("error", entry["error"])
    lost, r2 = _measured("lost_mass", entry["lost_mass"]), _measured("r2", entry["r2"])
    _within("skipped", shares, 0, 1)
    _within("lost_mass", lost, 0, 1)
    _within("error", errors, 0)
    return SkipThresholds(
        prefill=prefill,
        decode=_numbers("decode", entry["decode"], len(prefill), least=0.0),
        tile=tile,
        order=_one_of("order", entry["order"], ORDERS),
        keys=_keys(entry["keys"]),
        skipped=shares,
        error=errors,
        lost_mass=lost,
        r2=r2,
    )


def _theta(entry: Mapping[str, object]) -> ThetaThresholds:
    lengths = tuple(_whole("lengths", length, 1) for length in _list("lengths", entry["lengths"]))
    if any(first > second for first, second in itertools.pairwise(lengths)):
        raise _Refused("lengths do not ascend")
    theta = _table("theta", entry["theta"], len(lengths))
    denominator = _one_of("denominator", entry["denominator"], DENOMINATORS)
    lost = () if entry["lost"] == [] else _table("lost", entry["lost"], len(lengths), least=0.0)
    placement = _one_of("placement", entry["placement"], PLACEMENTS)
    needs_lost = (denominator, placement) == ("offline", "pre")
    if len(lost) not in ((len(theta),) if needs_lost else (0, len(theta))):
        raise _Refused("lost has another number of heads than theta")
    if not isinstance(entry["v_mean"], bool):
        raise _Refused(f"v_mean is {entry['v_mean']!r}")
    kept, error = _number("kept", entry["kept"]), _number("error", entry["error"])
    _within("kept", (kept,), 0, 1)
    _within("error", (error,), 0)
    return ThetaThresholds(
        k=_whole("k", entry["k"], 1),
        lengths=lengths,
        theta=theta,
        lost=lost,
        placement=placement,
        denominator=denominator,
        v_mean=entry["v_mean"],
        keys=_keys(entry["keys"]),
        kept=kept,
        error=error,
    )


def _list(field: str, value: object, length: int | None = None) -> list[object]:
    """A list of 1 to _MOST entries, or of `length`."""
    if not isinstance(value, list) or not 1 <= len(value) <= _MOST:
        raise _Refused(f"{field} is not a list of 1 to {_MOST} entries")
    if length is not None and len(value) != length:
        raise _Refused(f"{field} has {len(value)} entries where {length} belong")
    return value


def _numbers(
    field: str, value: object, length: int | None = None, least: float = -math.inf
) -> tuple[float, ...]:
    numbers = tuple(_finite(field, each) for each in _list(field, value, length))
    if min(numbers) < least:
        raise _Refused(f"{field} has an entry below {least:g}")
    return numbers


def _table(
    field: str, value: object, length: int, least: float = -math.inf
) -> tuple[tuple[float, ...], ...]:
    """[heads][length]."""
    return tuple(_numbers(field, row, length, least) for row in _list(field, value))


def _measured(field: str, value: object) -> tuple[float | None, float | None]:
    """The figures of prefill and decode."""
    first, second = _list(field, value, 2)
    return _number(field, first), _number(field, second)


def _number(field: str, value: object) -> float | None:
    return None if value is None else _finite(field, value)


def _finite(field: str, value: object) -> float:
    """A finite float; JSON as Python reads it has NaN, infinities and integers of any size."""
    if isinstance(value, float) and math.isfinite(value):
        return value
    if type(value) is int and -_WHOLE_END <= value < _WHOLE_END:
        return float(value)
    raise _Refused(f"{field} has an entry that is no finite number")


def _within(
    field: str, values: tuple[float | None, ...], least: float, most: float = math.inf
) -> None:
    if any(value is not None and not least <= value <= most for value in values):
        raise _Refused(f"{field} lies outside its range")


def _whole(field: str, value: object, least: int) -> int:
    if type(value) is not int or not least <= value < _WHOLE_END:
        raise _Refused(f"{field} has an entry that is no whole number from {least} on")
    return value


def _pair(field: str, value: object, least: int) -> tuple[int, int]:
    first, second = _list(field, value, 2)
    return _whole(field, first, least), _whole(field, second, least)


def _keys(value: object) -> tuple[int, int]:
    fewest, most = _pair("keys", value, 0)
    if fewest > most:
        raise _Refused("keys do not ascend")
    return fewest, most


def _one_of(field: str, value: object, known: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in known:
        raise _Refused(f"{field} {value!r} is not one of {', '.join(known)}")
    return value
