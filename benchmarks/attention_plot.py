"""Draws what sparse attention costs over the whole range of sparsity, as an SVG.

    pip install matplotlib                  # nothing else needs it
    python benchmarks/attention_plot.py benchmarks/results/attention-quality-*.json --out plot.svg

Reads what attention_quality.py keeps with --json; a line for each way to choose thresholds.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

from matplotlib import pyplot


def curves(paths: list[Path]) -> dict[str, list[tuple[float, float]]]:
    """Name of a line -> (share of visible tiles skipped, rise of the perplexity in percent)."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for path in paths:
        for result in json.loads(path.read_text())["results"]:
            if result["method"] == "skip":
                per = "a factor per head" if result["per"] == "head" else "one factor"
                name = f"{per}, {result['order'].replace('_', ' + ')}"
                name += " (the paper)" if name == "one factor, ascending" else ""
                found[name].append((result["evaluated"], result["rise"]))
    return {name: sorted(points) for name, points in found.items()}


def main() -> None:
    """Writes the plot."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path, nargs="+", help="JSON of attention_quality.py")
    parser.add_argument("--out", type=Path, default=Path("attention_quality.svg"))
    options = parser.parse_args()
    pyplot.rcParams["svg.hashsalt"] = "sparsefx"  # the same file from the same figures
    _, axes = pyplot.subplots(figsize=(7, 4))
    for name, points in sorted(curves(options.results).items()):
        axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xlabel("share of visible tiles skipped in the evaluation")
    axes.set_ylabel("perplexity over dense, %")
    axes.set_ylim(-1, 16)
    axes.legend()
    axes.grid(alpha=0.3)
    pyplot.savefig(options.out, metadata={"Date": None}, bbox_inches="tight")


if __name__ == "__main__":
    main()
