"""The one reader of the environment variables SPARSEFX_DUMP, SPARSEFX_SKIP and SPARSEFX_CACHE."""

import os
from dataclasses import dataclass
from pathlib import Path

from sparsefx.errors import InvalidSetting

DUMP_KINDS = ("passes", "kernels")


@dataclass(frozen=True)
class Settings:
    """What the environment asks for.

    `dump`: kinds to write, a subset of DUMP_KINDS. `dump_folder`: where they go.
    `skip`: names of passes to leave out. `cache`: folder of generated kernels and measured times.
    """

    dump: frozenset[str]
    dump_folder: Path
    skip: frozenset[str]
    cache: Path


def settings() -> Settings:
    """Reads the environment; raises InvalidSetting for a value that is not in the list."""
    return Settings(
        dump=_dump_kinds(os.environ.get("SPARSEFX_DUMP", "")),
        dump_folder=Path(os.environ.get("SPARSEFX_DUMP_FOLDER", "sparsefx_dump")),
        skip=frozenset(_words(os.environ.get("SPARSEFX_SKIP", ""))),
        cache=_cache_folder(),
    )


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _dump_kinds(text: str) -> frozenset[str]:
    words = _words(text)
    if words == ("all",):
        return frozenset(DUMP_KINDS)
    for word in words:
        if word not in DUMP_KINDS:
            known = ", ".join((*DUMP_KINDS, "all"))
            raise InvalidSetting(variable="SPARSEFX_DUMP", value=word, known=known)
    return frozenset(words)


def _cache_folder() -> Path:
    chosen = os.environ.get("SPARSEFX_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sparsefx"
