"""Never slower at any number of rows: one compiled graph against torch.compile's, 1 to 8192 rows.

    python benchmarks/never_slower.py [--layers 1536x576:2:4 576x1536:0.8] [--threads 2] [--json f]

Each layer is copied until its weights overflow the cache, and all copies run on one input of a
varying number of rows, compiled once by either side. The two run in turns; a ratio is dense over
ours, the median over pairs, the choosing of a kernel included. The promise is 0.97 everywhere.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import record
import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.guard import MARGIN

LAYERS = ("1536x576:2:4", "576x576:0.5", "576x1536:0.8", "2048x2048:0.9")
CACHE_BYTES = 64 << 20
MOST = 8192
SECONDS = 0.4  # a number of rows


class Copies(nn.Module):
    """Equal layers with weights of their own, on one input."""

    def __init__(self, out: int, in_: int, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(in_, out, bias=False) for _ in range(count))

    def forward(self, x: Tensor) -> list[Tensor]:
        """x [rows, in] through each layer."""
        return [layer(x) for layer in self.layers]


def main() -> None:
    """Prints a line a layer and number of rows, then the worst."""
    options = _options()
    torch.set_num_threads(options.threads)
    results: list[dict[str, object]] = []
    with torch.no_grad():
        for layer in options.layers:
            torch._dynamo.reset()
            results += list(_swept(layer, list(options.rows)))
    worst = min(results, key=lambda each: float(str(each["ratio"])))
    print(f"worst: {worst['ratio']} ({worst['layer']} at {worst['rows']} rows); promise: {MARGIN}")
    if options.json:
        record.write(options.json, {"layers": options.layers}, results)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", nargs="*", default=LAYERS, help="OUTxIN:SHARE or OUTxIN:N:M")
    parser.add_argument("--rows", nargs="*", type=int, default=_sizes(), help="numbers of rows")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="a JSON file of the results")
    return parser.parse_args()


def _sizes() -> list[int]:
    """Each power of two, one row more, and one and a half times as many."""
    powers = [2**power for power in range(14)]
    return sorted({size for at in powers for size in (at, at + 1, at * 3 // 2) if size <= MOST})


def _swept(layer: str, sizes: list[int]) -> Iterator[dict[str, object]]:
    shape, _, pattern = layer.partition(":")
    out, in_ = (int(size) for size in shape.split("x"))
    torch.manual_seed(0)
    model = Copies(out, in_, max(1, min(12, CACHE_BYTES // (out * in_ * 4))))
    model = sparsefx.sparsify(model.eval(), sparsefx.Recipe({"*": _pattern(pattern)}))
    dense = torch.compile(model, dynamic=True)
    fast = sparsefx.compile(model, dynamic=True)
    fast(torch.randn(max(3, sizes[0]), in_))
    print(f"{layer}: {sparsefx.explain(fast).rows[0].by_rows or 'one form for all rows'}")
    for rows in sizes:
        x = torch.randn(rows, in_)
        ratio, dense_us = _ratio(lambda x=x: dense(x), lambda x=x: fast(x))  # type: ignore[misc]
        print(f"  {rows:5} rows {dense_us / len(model.layers):9.0f} us dense {ratio:6.3f}x")
        yield {"layer": layer, "rows": rows, "dense_us": dense_us, "ratio": round(ratio, 4)}


def _pattern(text: str) -> sparsefx.NM | sparsefx.Unstructured:
    if ":" in text:
        n, m = (int(part) for part in text.split(":"))
        return sparsefx.NM(n, m)
    return sparsefx.Unstructured(float(text))


def _ratio(dense: Callable[[], object], ours: Callable[[], object]) -> tuple[float, float]:
    """Median of dense / ours over pairs, and the median microseconds of dense."""
    for _ in range(2):
        dense(), ours()
    pairs: list[tuple[float, float]] = []
    deadline = time.perf_counter() + SECONDS
    while len(pairs) < 5 or (time.perf_counter() < deadline and len(pairs) < 200):
        first, second = (dense, ours) if len(pairs) % 2 else (ours, dense)
        times = _seconds(first), _seconds(second)
        pairs.append(times if len(pairs) % 2 else (times[1], times[0]))
    ratio = statistics.median(a / b for a, b in pairs)
    return ratio, statistics.median(a for a, _ in pairs) * 1e6


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
