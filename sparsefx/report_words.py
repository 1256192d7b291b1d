"""How a report writes numbers, the same in text and HTML."""

from sparsefx.report_rows import Row, Totals


def microseconds(value: float | None) -> str:
    """A time to three digits, without unit: 0.123, 12.3, 1234; "" for None."""
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def duration(value: float) -> str:
    """A time in microseconds with its unit: "12.3 us", "4.56 ms", "7.89 s", "2.5 min", "3.1 h"."""
    for least, size, unit in ((7.2e9, 3.6e9, "h"), (1.2e8, 6e7, "min"), (1e6, 1e6, "s")):
        if value >= least:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e3:.3g} ms" if value >= 1e3 else f"{value:.3g} us"


def quantised(row: Row) -> str:
    """The note on the best quantised dense product: "quantised dense 310 us"; "" for none."""
    return "" if row.quantised_us is None else f"quantised dense {duration(row.quantised_us)}"


def times(value: float | None) -> str:
    """A ratio: "1.25x"; "" for None."""
    if value is None:
        return ""
    return f"{value:.0f}x" if value >= 100 else f"{value:.2f}x"


def error(value: float | None) -> str:
    """A relative error: "0", "1.2e-07"; "" for None."""
    if value is None:
        return ""
    return f"{value:.1e}" if value else "0"


def size(value: int) -> str:
    """A number of bytes: "512 B", "1.50 MB" (10^6 bytes)."""
    for unit_size, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if value >= unit_size:
            return f"{value / unit_size:.3g} {unit}"
    return f"{value} B"


def percent(part: int, whole: int) -> str:
    """`part` of `whole`: "56%"; "" where there is no whole."""
    return f"{part / whole:.0%}" if whole else ""


def share(value: float | None) -> str:
    """A share to three digits: "67.8%", "0.012%"; "" for None."""
    return "" if value is None else f"{100 * value:.3g}%"


def source(totals: Totals) -> str:
    """Where the times come from: "180 measured, 30 modelled, 10 without times"."""
    parts = [f"{count} {how}" for how, count in totals.how]
    missing = totals.candidates - totals.timed
    return ", ".join([*parts, f"{missing} without times"] if missing else parts)


def printable(text: str) -> str:
    """`text` on one line without control characters: a module's name cannot drive a terminal."""
    line = (" " if letter.isspace() else letter for letter in text)
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in line)


def figure(value: float | None) -> str:
    """A number to three digits: "0.123", "1.2e-07", "1234"; "" for None."""
    if value is None:
        return ""
    return f"{value:.0f}" if 1000 <= value < 1e6 else f"{value:.3g}"


def amount(value: int) -> str:
    """A number of things: "512", "53.1 M" (10^6)."""
    for unit_size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= unit_size:
            return f"{value / unit_size:.3g} {unit}"
    return str(value)


def counted(value: int, noun: str) -> str:
    """A number with its noun: "1 layer", "210 layers"."""
    return f"{value} {noun}" if value == 1 else f"{value} {noun}s"
