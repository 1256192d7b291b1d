"""The JSON form of every report: version, title, facts and a list of entries of typed fields."""

import json
import reprlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType

from sparsefx.errors import InvalidReport
from sparsefx.files import write_atomically

_INTEGERS = 2**53  # beyond, readers of JSON differ, and 10^400 has no float


@dataclass(frozen=True)
class Contents:
    """What a JSON report says; the entries are not checked yet."""

    version: int
    title: str
    facts: dict[str, str]
    entries: list[object]


def write(path: Path, key: str, contents: Contents, indent: int | None) -> None:
    """Writes the entries under `key`; the file appears whole or not at all.

    Raises ValueError on NaN and infinity, OSError.
    """
    data = {
        "version": contents.version,
        "title": contents.title,
        "facts": contents.facts,
        key: contents.entries,
    }
    write_atomically(path, json.dumps(data, indent=indent, allow_nan=False).encode())


def read(path: Path, key: str, versions: Sequence[int]) -> Contents:
    """Reads what `write` wrote under `key`. Raises InvalidReport, OSError."""
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InvalidReport(path=path, rule=f"it is not JSON: {error}") from error
    version = data.get("version") if isinstance(data, dict) else None
    if not isinstance(data, dict) or type(version) is not int or version not in versions:
        known = " or ".join(str(number) for number in versions)
        raise InvalidReport(path=path, rule=f"it is not a report of version {known}")
    title, facts, entries = data.get("title"), data.get("facts"), data.get(key)
    if not isinstance(title, str) or not isinstance(facts, dict) or not isinstance(entries, list):
        raise InvalidReport(path=path, rule=f"title, facts or {key} are missing")
    if not all(isinstance(text, str) for text in facts.values()):
        raise InvalidReport(path=path, rule="a fact is not text")
    return Contents(version, title, facts, entries)


def entry_of(
    path: Path, entry: object, types: Mapping[str, object], known: Collection[str], noun: str
) -> dict[str, object]:
    """The fields of one entry: exactly those in `known`, each of its type in `types`.

    A type is a class or a union of classes; 12 passes for 12.0, and True for no number. Raises
    InvalidReport, which calls the entry a `noun`.
    """
    if not isinstance(entry, dict) or set(entry) != set(known):
        names = ", ".join(name for name in types if name in known)
        raise InvalidReport(path=path, rule=f"a {noun} does not have the fields {names}")
    for name, value in entry.items():
        if not _fits(value, types[name]):
            shown = reprlib.repr(value)
            raise InvalidReport(path=path, rule=f"{name} of a {noun} is {shown}")
    return entry


def _fits(value: object, kind: object) -> bool:
    assert isinstance(kind, type | UnionType)
    if isinstance(value, bool) or (isinstance(value, int) and abs(value) >= _INTEGERS):
        return False
    return isinstance(value, kind) or (isinstance(value, int) and isinstance(0.0, kind))
