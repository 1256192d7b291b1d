"""The part of docs/performance.md about whole models: paired times, and the best recipe found."""

from collections.abc import Callable
from pathlib import Path

from benchmarks.results_files import missing, newest, table


def model(results: Path) -> str:
    """SparseFX and Inductor, dense and pruned."""
    figures = newest(results, "models")
    if figures is None:
        return missing("model.py")
    names = list(dict.fromkeys(name for line in figures.lines for name in line["ratios"]))
    rows = [
        (
            line["model"],
            line["weights"],
            line["phase"],
            line["dtype"],
            f"{line['ms']['SparseFX']:.1f}",
            *(_against(line["ratios"].get(name), line["ms"].get(name)) for name in names),
            line["kernels"],
        )
        for line in figures.lines
    ]
    against = (f"ratio to {name} (5 to 95 %), its ms" for name in names)
    head = ("model", "weights", "phase", "type", "SparseFX, ms", *against, "sparse kernels")
    return f"{table(head, rows)}\n\n{figures.source()}"


def _against(ratio: dict[str, float] | None, milliseconds: float | None) -> str | None:
    if ratio is None or milliseconds is None:
        return None
    return f"{ratio['ratio']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}), {milliseconds:.1f}"


def recipes(results: Path) -> str:
    """Perplexity and decoding of each recipe; the fastest within the limit is marked."""
    figures = newest(results, "recipes")
    if figures is None:
        return missing("recipes.py")
    limit = figures.options["limit"]
    within = [line for line in figures.lines if line["perplexity_ratio"] <= limit]
    best = min(within, key=lambda line: line["ms"]["SparseFX"], default=None)
    rows = [
        (
            f"**{line['recipe']}**" if line is best else line["recipe"],
            line["says"],
            f"{line['perplexity']:.2f} ({line['perplexity_ratio']:.3f} x)",
            f"{line['ms']['SparseFX']:.1f}",
            *(f"{ratio['ratio']:.2f}" for ratio in line["ratios"].values()),
            line["kernels"],
            f"{line['megabytes']:.0f}",
        )
        for line in figures.lines
    ]
    against = [f"ratio to {name}" for name in (figures.lines[0]["ratios"] if rows else ())]
    head = ("recipe", "what", "perplexity", "token, ms", *against, "kernels", "weights, MB")
    said = f"The best within {limit} x: **{best['recipe']}**." if best else "None is within it."
    return f"{said}\n\n{table(head, rows)}\n\n{figures.source()}"


def encoder(results: Path) -> str:
    """A pruned encoder in onnxruntime, with our library of kernels and without."""
    figures = newest(results, "encoder")
    if figures is None:
        return missing("ort_library.py")
    rows = [(line["name"], line["ms"], line["ratio"]) for line in figures.lines]
    what = "{layers} layers, {tokens} tokens, batch {batch}, {sparsity:.0%} of the weights zero"
    said = what.format(**figures.options)
    head = ("file and runtime", "ms", "library is x as fast")
    return f"{said}:\n\n{table(head, rows)}\n\n{figures.source()}"


MODEL_BLOCKS: dict[str, Callable[[Path], str]] = {
    "model": model,
    "recipes": recipes,
    "encoder": encoder,
}
