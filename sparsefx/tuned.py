"""Tuning results as a file: the guard's verdicts, to be shipped with a model.

A small JSON file: {"version": 1, "entries": [{"key": {...}, "value": {...}}]}. A key is all that a
timing depends on: the layer's spec, the kernel (a hash of its text), device, threads, versions. An
entry answers the very same question and no other.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sparsefx.errors import InvalidTuning
from sparsefx.files import write_atomically

VERSION = 1
_LARGEST_BYTES = 64 * 2**20  # of a file: each entry has some 600 bytes
_PLACE = ("device", "threads", "torch", "triton")

Facts = dict[str, object]


@dataclass(eq=False)
class Tuned:
    """Verdicts of an earlier run, by question; counts what became of them."""

    name: str
    entries: dict[str, tuple[dict[str, str], Facts]]
    used: set[str] = field(default_factory=set)
    missed: dict[str, str] = field(default_factory=dict)
    """Questions without an answer here, each with the reason."""
    _asked: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, path: str | Path) -> "Tuned":
        """Reads what `write` wrote. Raises InvalidTuning, OSError."""
        path = Path(path)
        if path.stat().st_size > _LARGEST_BYTES:
            raise InvalidTuning(path=path, rule=f"it is larger than {_LARGEST_BYTES} bytes")
        try:
            data = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise InvalidTuning(path=path, rule=f"it is not JSON: {error}") from error
        if not isinstance(data, dict) or data.get("version") != VERSION:
            raise InvalidTuning(path=path, rule=f"it is no tuning file of version {VERSION}")
        entries = data.get("entries")
        if not isinstance(entries, list):
            raise InvalidTuning(path=path, rule="it has no list of entries")
        pairs = [_entry(path, entry) for entry in entries]
        return cls(path.name, {_name(key): (key, value) for key, value in pairs})

    @property
    def asked(self) -> set[str]:
        """The questions that were asked, found or not, as JSON texts with the kernel's own text."""
        return self._asked

    def find(self, key: Mapping[str, str]) -> Facts | None:
        """The verdict on exactly this question, or None."""
        self._asked.add(_name(key))
        asked = _hashed(key)
        name = _name(asked)
        if name in self.entries:
            self.used.add(name)
            return self.entries[name][1]
        self.missed[name] = self._why_not(asked)
        return None

    def _why_not(self, asked: Mapping[str, str]) -> str:
        """What differs from the entry that comes closest."""
        others = [key for key, _ in self.entries.values() if key.get("spec") == asked["spec"]]
        if not others:
            return "no such layer and number of rows in it"
        same_place = [key for key in others if all(key.get(n) == asked[n] for n in _PLACE)]
        if not same_place:
            return "it was made on another device, or with other versions or threads"
        return "its kernels are not those of this version of SparseFX"

    def __str__(self) -> str:
        reasons = sorted(set(self.missed.values()))
        missing = f"; measured here: {len(self.missed)} ({'; '.join(reasons)})" if reasons else ""
        return f"{self.name}: {len(self.used)} of {len(self.entries)} verdicts used{missing}"


def write(path: str | Path, verdicts: Mapping[str, Facts]) -> None:
    """Writes verdicts by the JSON text of their question; whole or not at all. Raises OSError."""
    pairs = [(_hashed(json.loads(text)), facts) for text, facts in sorted(verdicts.items())]
    entries = [{"key": key, "value": facts} for key, facts in pairs]
    data = {"version": VERSION, "entries": entries}
    write_atomically(Path(path), (json.dumps(data, indent=1, allow_nan=False) + "\n").encode())


def _entry(path: Path, entry: object) -> tuple[dict[str, str], Facts]:
    if not isinstance(entry, dict) or set(entry) != {"key", "value"}:
        raise InvalidTuning(path=path, rule="an entry has not exactly a key and a value")
    key, value = entry["key"], entry["value"]
    if not isinstance(key, dict) or not all(isinstance(text, str) for text in key.values()):
        raise InvalidTuning(path=path, rule="the key of an entry is not texts by name")
    if not isinstance(value, dict):
        raise InvalidTuning(path=path, rule="the value of an entry is not numbers by name")
    return key, value


def _hashed(key: Mapping[str, str]) -> dict[str, str]:
    """The key with a hash in place of the kernel's text."""
    digest = hashlib.sha256(key["kernel"].encode()).hexdigest()[:32]
    return {**key, "kernel": digest}


def _name(key: Mapping[str, str]) -> str:
    return json.dumps(dict(key), sort_keys=True)
