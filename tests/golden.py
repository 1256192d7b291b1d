"""Expected text, kept in tests/golden/; SPARSEFX_ACCEPT=1 rewrites it."""

import os
from pathlib import Path

_FOLDER = Path(__file__).parent / "golden"


def assert_golden(name: str, text: str) -> None:
    """Asserts that `text` is the content of tests/golden/`name`, or accepts it as that."""
    path = _FOLDER / name
    if os.environ.get("SPARSEFX_ACCEPT") == "1":
        path.write_text(text)
    expected = path.read_text() if path.exists() else ""
    assert text == expected, f"{path.name} differs; SPARSEFX_ACCEPT=1 accepts the new text"
