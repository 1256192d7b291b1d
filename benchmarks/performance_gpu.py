"""The part of docs/performance.md about linears on GPUs; without one, what is known of them."""

from collections.abc import Callable
from pathlib import Path

from benchmarks.results_files import Figures, Line, missing, newest, table


def gpu(results: Path) -> str:
    """A line for each goal; the worst of its shapes and rows, or the roofline's."""
    figures = newest(results, "linear-llama")
    if figures is None:
        return missing("linear.py")
    groups: dict[tuple[str, float, float, bool], list[Line]] = {}
    for line in figures.lines:
        key = (line["storage"], line["reach"], line["aim"], line["rows"] > 64)
        groups.setdefault(key, []).append(line)
    is_measured = all(line["how"] == "measured" for line in figures.lines)
    return (_measured if is_measured else _planned)(figures, list(groups.values()))


def _measured(figures: Figures, groups: list[list[Line]]) -> str:
    rows = []
    for lines in groups:
        timed = [line["ratio"] for line in lines if line["ratio"]]
        fractions = [line["fraction"] for line in lines if line["fraction"]]
        worst, best = min(timed, default=None), max(timed, default=None)
        reached = "yes" if worst and worst >= lines[0]["reach"] else "**no**"
        share = f"{min(fractions):.0%}" if fractions else None
        rows.append((*_head(lines), worst, best, reached, share, lines[0]["reason"] or None))
    head = (
        "weight",
        "rows",
        "to reach",
        "aim",
        "worst",
        "best",
        "reached",
        "of roofline",
        "reason",
    )
    return f"{table(head, rows)}\n\n{figures.source()}"


def _planned(figures: Figures, groups: list[list[Line]]) -> str:
    rows = []
    for lines in groups:
        bounds = (
            f"{min(line[key] for line in lines):.2f} to {max(line[key] for line in lines):.2f}"
            for key in ("bound", "ratio")
        )
        rows.append((*_head(lines), *bounds, lines[0]["kernel"] or None, _resources(lines)))
    ends = ("bytes allow", "with launches", "kernel", "compiled for sm_90")
    head = ("weight", "rows", "to reach", "aim", *ends)
    return (
        "**Not measured: no GPU was at hand.** What the datasheet of an H200 allows over the four "
        "shapes, and with 3 us for each launch, of which CUDA graphs hide a part; products of 2:4 "
        "are counted as dense ones. A kernel reaches less.\n\n"
        f"{table(head, rows)}\n\nCompiled on {figures.source()}"
    )


def _head(lines: list[Line]) -> tuple[str, str, float, float]:
    counts = ", ".join(map(str, sorted({line["rows"] for line in lines})))
    return lines[0]["storage"], counts, lines[0]["reach"], lines[0]["aim"]


def _resources(lines: list[Line]) -> str | None:
    """Of the first line that was compiled: the kernel is the same at other shapes."""
    line = next((line for line in lines if line["resources"] or line["reason"]), None)
    if line is None:
        return None
    if line["reason"]:
        return str(line["reason"])[:160]
    found = line["resources"]
    matrix = {"mma", "mma_sp", "wgmma", "tcgen05"}
    used = {name: count for name, count in found["instructions"].items() if name in matrix}
    said = ", ".join(f"{count} {name}" for name, count in used.items()) or "no matrix instruction"
    kilobytes = int(found["shared"]) / 1024
    memory = f"{found['spills']} B spilled, {kilobytes:.0f} KiB shared"
    return f"{found['registers']} registers, {memory}, {said}"


GPU_BLOCKS: dict[str, Callable[[Path], str]] = {"gpu-goals": gpu}
