"""Small facts that are dear to find again (times, speeds), on disk under the hash of their key."""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from sparsefx.files import write_atomically


def recall(folder: Path, key: Mapping[str, str]) -> dict[str, object] | None:
    """The value stored under `key`, or None where there is none or the file is not readable.

    A damaged file counts as absent: the caller finds the fact again and writes it anew.
    """
    try:
        entry = json.loads(_path(folder, key).read_bytes())
    except (OSError, ValueError, RecursionError):  # RecursionError: "[[[[..." thousands deep
        return None
    if not isinstance(entry, dict) or entry.get("key") != dict(key):
        return None
    value = entry.get("value")
    return value if isinstance(value, dict) else None


def remember(folder: Path, key: Mapping[str, str], value: Mapping[str, object]) -> None:
    """Stores `value` under `key`, whole or not at all; several processes may do so at once."""
    entry = {"key": dict(key), "value": dict(value)}
    text = json.dumps(entry, indent=1, allow_nan=False)
    # A cache that cannot be written (read-only home, full disk) costs time, never an answer.
    with contextlib.suppress(OSError):
        write_atomically(_path(folder, key), text.encode())


def number(value: object) -> float | None:
    """`value` if it is a number in [0, 1e18), else None: the check of what was read."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value < 1e18 else None


def _path(folder: Path, key: Mapping[str, str]) -> Path:
    text = json.dumps(dict(key), sort_keys=True)
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
