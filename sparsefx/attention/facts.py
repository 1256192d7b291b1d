"""What the report says of thresholds: their fields of a row, and themselves in words."""

from collections.abc import Iterable

from sparsefx.attention.thresholds import AttentionThresholds, SkipThresholds, ThetaThresholds


def row_facts(found: AttentionThresholds, is_decode: bool) -> dict[str, object]:
    """What a report row says of thresholds, of the phase that a graph is for.

    `skipped`, `lost_mass`, `error` (relative output error of the layer) and `thresholds`.
    """
    if isinstance(found, ThetaThresholds):
        skipped = None if found.kept is None else 1 - found.kept
        return {"skipped": skipped, "error": found.error, "thresholds": in_words(found)}
    return {
        "skipped": found.skipped[is_decode],
        "lost_mass": found.lost_mass[is_decode],
        "error": found.error[is_decode],
        "thresholds": in_words(found),
    }


def in_words(found: AttentionThresholds) -> str:
    """E.g. "prefill factors 3.1..420, decode 0.4..33, R2 0.98, calibrated 128..2048 keys".

    R2 is that of the worse phase; the output error, where it was measured, is that of the layer.
    """
    parts = _skip(found) if isinstance(found, SkipThresholds) else _theta(found)
    fewest, most = found.keys
    calibrated = f"calibrated {_span((fewest, most))} keys" if most else "not calibrated"
    return ", ".join([*parts, calibrated])


def _skip(found: SkipThresholds) -> list[str]:
    parts = [f"prefill factors {_span(found.prefill)}", f"decode {_span(found.decode)}"]
    if fits := [r2 for r2 in found.r2 if r2 is not None]:
        parts.append(f"R2 {min(fits):.2f}")
    errors = zip(("prefill", "decode"), found.error, strict=True)
    if texts := [f"{_percent(error)} in {phase}" for phase, error in errors if error is not None]:
        parts.append(f"output error {' and '.join(texts)}")
    return parts


def _theta(found: ThetaThresholds) -> list[str]:
    parts = [f"theta {_span(value for head in found.theta for value in head)}"]
    if found.kept is not None:
        parts.append(f"keeps {_percent(found.kept)} of longer rows")
    if found.error is not None:
        parts.append(f"output error {_percent(found.error)}")
    return parts


def _span(values: Iterable[float]) -> str:
    """The smallest and the largest, once where they are written alike."""
    known = list(values)
    low, high = _figure(min(known)), _figure(max(known))
    return low if low == high else f"{low}..{high}"


def _figure(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def _percent(value: float) -> str:
    return f"{100 * value:.2g}%"
