"""What TOML values may be, and the error for what they are not."""

import sys
from pathlib import Path

from sparsefx.errors import InvalidRecipe


def is_whole(value: object) -> bool:
    """Whole numbers of TOML have 64 bits; those of tomllib have no limit."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def is_real(value: object) -> bool:
    """A finite number; false for NaN, which compares false."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= sys.float_info.max  # type: ignore[arg-type]  # is_number


def invalid(path: str | Path, rule: str) -> InvalidRecipe:
    """The error for a recipe file that breaks `rule`."""
    return InvalidRecipe(where=path, rule=rule, remedy="Recipe.to_toml shows the form")
