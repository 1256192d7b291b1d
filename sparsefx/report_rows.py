"""What a report is made of: one Row a candidate node, and the Totals over rows."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

HOW = ("measured", "modelled", "")


@dataclass(frozen=True)
class Row:
    """What became of one candidate node (a linear, a convolution or an attention).

    name: module path, e.g. "model.layers.0.mlp.up_proj";
    op: "linear", "conv", "attention", "experts" or "layer";
    graph: which captured graph of the model it is in, counted from 0;
    shape: e.g. "1536x576 @ 128"; out x in @ rows of the input, "128.." where calls vary;
    pattern: the sparsity found, e.g. "2:4", "unstructured 50%", "dense";
    kernel: the chosen kernel, "" where it stayed dense; times in microseconds, NaN-free, None where
    not taken; how: "measured", "modelled" or ""; error: largest |sparse - dense| over largest
    |dense| on the guard's inputs; reason: why the node stayed dense, or why a
    kernel reads it in another storage than its own ("" only if a kernel is there).
    by_rows: where a table in the graph chooses by the rows of each call: who runs which, e.g.
    "cpp_nm_linear 1..32, dense 33..", the times being those at the rows of `shape`; else "".
    bytes: dense and stored bytes of the weight, and those that the compiled model keeps in memory:
    dense and packed, or packed alone (memory="small"). merged: the other layers that the same call
    computes, e.g. "k_proj, v_proj"; times and bytes but the dense are then this one's share.
    quantised_us: of a weight with quantised values, the time of the best quantised dense product
    that torch has for it here, None where there is none or nothing was measured; for information.

    Of an attention: error: relative output error of the layer, |O - dense| / |dense| in the 2-norm,
    on the calibration data; skipped: share of tiles (or elements) that these data skipped in this
    phase; lost_mass: the largest mean softmax mass that a head lost there; crossover: fewest keys
    that run the kernel, fewer go dense; thresholds: what they are, in words, e.g. "prefill factors
    3.1..420, decode 0.4..33, R2 0.98, calibrated 128..2048 keys", "" for none.
    """

    name: str
    op: str
    graph: int = 0
    shape: str = ""
    pattern: str = "dense"
    kernel: str = ""
    dense_us: float | None = None
    sparse_us: float | None = None
    how: str = ""
    error: float | None = None
    reason: str = ""
    dense_bytes: int = 0
    stored_bytes: int = 0
    skipped: float | None = None
    lost_mass: float | None = None
    crossover: int | None = None
    thresholds: str = ""
    by_rows: str = ""
    kept_bytes: int = 0
    merged: str = ""
    quantised_us: float | None = None

    @property
    def speedup(self) -> float | None:
        """dense_us / sparse_us, or None where a time is missing."""
        if self.dense_us is None or not self.sparse_us:
            return None
        return self.dense_us / self.sparse_us

    @property
    def chosen_us(self) -> float | None:
        """The time of what runs now: sparse_us under a kernel, else dense_us; by rows the less."""
        if self.by_rows and self.dense_us is not None and self.sparse_us is not None:
            return min(self.dense_us, self.sparse_us)
        return self.sparse_us if self.kernel else self.dense_us

    def violations(self) -> list[str]:
        """What breaks the promise "a kernel with two times, or a reason"; empty if nothing does."""
        names = ("dense_us", "sparse_us", "error", "quantised_us")
        numbers = {name: getattr(self, name) for name in names}
        found = [
            f"{field} is {value}"
            for field, value in numbers.items()
            if value is not None and not (math.isfinite(value) and value >= 0)
        ]
        if self.kernel and None in (self.dense_us, self.sparse_us) and not self.reason:
            found.append(f"kernel {self.kernel} has neither two times nor a reason")
        if not self.kernel and not self.reason:
            found.append("it stayed dense without a reason")
        if self.how not in HOW:
            found.append(f"how is {self.how!r}")
        if self.sparse_us is not None and not self.how:
            found.append("it has a time and does not say how it was found")
        if min(self.dense_bytes, self.stored_bytes, self.kept_bytes) < 0:
            found.append("a number of bytes is negative")
        found += [
            f"{field} is {value}, no share"
            for field, value in (("skipped", self.skipped), ("lost_mass", self.lost_mass))
            if value is not None and not 0 <= value <= 1
        ]
        if self.crossover is not None and self.crossover < 0:
            found.append(f"crossover is {self.crossover}")
        return [f"{self.name} (graph {self.graph}): {text}" for text in found]


@dataclass(frozen=True)
class Totals:
    """Sums over rows.

    kernels and reasons: how many nodes have each, most frequent first; dense_us and chosen_us: time
    of the `timed` nodes before and now, in microseconds; dense_bytes and stored_bytes: weights.
    """

    candidates: int
    lowered: int
    kernels: tuple[tuple[str, int], ...]
    reasons: tuple[tuple[str, int], ...]
    how: tuple[tuple[str, int], ...]
    timed: int
    dense_us: float
    chosen_us: float
    dense_bytes: int
    stored_bytes: int
    kept_bytes: int
    error: float | None

    @property
    def declined(self) -> int:
        """Nodes that stayed dense."""
        return self.candidates - self.lowered

    @property
    def speedup(self) -> float | None:
        """dense_us / chosen_us, or None where nothing was timed."""
        return self.dense_us / self.chosen_us if self.chosen_us else None


def total(rows: Sequence[Row]) -> Totals:
    """The sums over `rows`."""
    lowered = [row for row in rows if row.kernel]
    timed = [row for row in rows if row.dense_us is not None and row.chosen_us is not None]
    # An attention's error is that of its thresholds, the others' that of a kernel's rounding.
    errors = [row.error for row in lowered if row.error is not None and row.op != "attention"]
    return Totals(
        candidates=len(rows),
        lowered=len(lowered),
        kernels=_counts(row.kernel for row in lowered),
        reasons=_counts(row.reason for row in rows if row.reason or not row.kernel),
        how=_counts(row.how for row in timed if row.how),
        timed=len(timed),
        dense_us=sum(row.dense_us or 0.0 for row in timed),
        chosen_us=sum(row.chosen_us or 0.0 for row in timed),
        dense_bytes=sum(row.dense_bytes for row in rows),
        stored_bytes=sum(stored_bytes(row) for row in rows),
        kept_bytes=sum(row.kept_bytes or stored_bytes(row) for row in rows),
        error=max(errors, default=None),
    )


def stored_bytes(row: Row) -> int:
    """Bytes that the weight takes now; a row that does not say so keeps its dense bytes."""
    return row.stored_bytes or row.dense_bytes


def shared(changes: Mapping[str, object], share: float) -> dict[str, object]:
    """New fields of a row whose layer is a `share` of a call: its part of the times and bytes."""
    parts = dict(changes)
    for name, value in changes.items():
        if name in ("dense_us", "sparse_us", "quantised_us") and isinstance(value, float):
            parts[name] = value * share
        if name in ("stored_bytes", "kept_bytes") and isinstance(value, int):
            parts[name] = round(value * share)
    return parts


def _counts(words: Iterable[str]) -> tuple[tuple[str, int], ...]:
    return tuple(Counter(words).most_common())
