"""The part of docs/performance.md about linears on CPU: goals, rows, crossovers, plots."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.chart import Points, chart, crossover
from benchmarks.results_files import Figures, Line, missing, newest, table

BIG = "4096x4096"
RANGES = (1, 8, 64, 512, 8192)  # numbers of rows that share a column
LEVEL = 0.97  # of dense: what the guard must keep
NEAR = 0.6  # share of the roofline from which on it is what binds


@dataclass(frozen=True)
class Goal:
    """A ratio to reach at 1 and 8 rows of 4096 x 4096."""

    name: str
    value_type: str
    pattern: str
    reach: float
    values: tuple[str, ...] = ("",)


GOALS = (
    Goal("bitmap fp32 50 %", "fp32", "bitmap 50 %", 1.3),
    Goal("bitmap fp32 80 %", "fp32", "bitmap 80 %", 2.8),
    Goal("bitmap fp32 90 %", "fp32", "bitmap 90 %", 4.5),
    Goal("2:4 bf16", "bf16", "2:4", 1.4),
    Goal("2:4 int8, against int8 dynamic", "int8", "2:4", 1.2, ("int8_dynamic", "int8")),
)


def goals(results: Path) -> str:
    """What was to be reached, what was, and what binds it."""
    figures = newest(results, "linears-quick")
    if figures is None:
        return missing("cpu.py --quick")
    rows = []
    for goal in GOALS:
        for count in sorted({line["rows"] for line in figures.lines}):
            line = _best(figures, goal, count)
            if line:
                dense = f"{line['dense_us'][line['dense']]:.0f} ({line['dense']})"
                kernel = f"{line['sparse_us']:.0f} ({line['kernel']})"
                is_reached = "yes" if line["ratio"] >= goal.reach else "**no**"
                reached = (line["ratio"], goal.reach, is_reached, line["guard"])
                rows.append((goal.name, count, dense, kernel, *reached, *_bound(line)))
    head = ("4096x4096", "rows", "best dense, us", "sparse, us", "ratio", "to reach", "reached")
    said = table((*head, "guard runs", "of roofline", "bound by"), rows)
    return f"{said}\n\n{figures.source()} {_speeds(figures)}"


def _best(figures: Figures, goal: Goal, rows: int) -> Line | None:
    """Of the ways to store the values that serve the goal the fastest."""
    fitting = [
        line
        for line in figures.lines
        if (line["value_type"], line["pattern"], line["rows"])
        == (goal.value_type, goal.pattern, rows)
        and line["values"] in goal.values
        and line["ratio"]
    ]
    return max(fitting, key=lambda line: line["ratio"], default=None)


def _bound(line: Line) -> tuple[str, str]:
    share = f"{line['fraction']:.0%}"
    cached, taken = line["in_cache_us"], line["sparse_us"]
    if line["fraction"] >= NEAR or not cached:
        return share, line["bound"]
    if cached > 0.8 * taken:
        return share, "instructions: no faster with weights in cache"
    return share, f"instructions and memory: {cached:.0f} us with weights in cache"


def _speeds(figures: Figures) -> str:
    peaks = figures.options["peaks"]
    flops = ", ".join(f"{name} {peaks['flops'][name] / 1e9:.0f}" for name in ("fp32", "bf16"))
    int8, bandwidth = peaks["flops"]["int8"] / 1e9, peaks["bandwidth"] / 1e9
    return (
        f"Measured speeds of the machine: {bandwidth:.1f} GB/s from memory; "
        f"GFLOP/s {flops}, int8 {int8:.0f}."
    )


def ladder(results: Path) -> str:
    """Ratios over rows at 4096 x 4096, one line for each value type and storage."""
    figures = newest(results, "linears")
    if figures is None:
        return missing("cpu.py")
    counts = sorted({line["rows"] for line in figures.lines if line["shape"] == BIG})
    rows = [
        (*key, *(found.get(count) for count in counts))
        for key, found in _ratios(figures, BIG).items()
    ]
    head = ("type", "values", "pattern", *(f"{count} rows" for count in counts))
    return f"{table(head, rows)}\n\n{figures.source()}"


Key = tuple[str, str, str]


def _ratios(figures: Figures, shape: str) -> dict[Key, dict[int, float]]:
    """(value type, values, pattern) -> rows -> ratio."""
    found: dict[Key, dict[int, float]] = {}
    for line in figures.lines:
        if line["shape"] == shape and line["ratio"]:
            key = (line["value_type"], line["values"], line["pattern"])
            found.setdefault(key, {})[line["rows"]] = line["ratio"]
    return found


def crossovers(results: Path) -> str:
    """For each shape: the ratio at one row, and the rows from which on dense is faster."""
    figures = newest(results, "linears")
    if figures is None:
        return missing("cpu.py")
    shapes = list(dict.fromkeys(line["shape"] for line in figures.lines))
    cells: dict[Key, dict[str, str]] = {}
    for shape in shapes:
        for key, ratios in _ratios(figures, shape).items():
            crossed = crossover(list(ratios.items()))
            level = "never" if crossed is None else f"{crossed:.0f}"
            cells.setdefault(key, {})[shape] = f"{ratios[min(ratios)]:.2f}, {level}"
    rows = [(*key, *(found.get(shape) for shape in shapes)) for key, found in cells.items()]
    return f"{table(('type', 'values', 'pattern', *shapes), rows)}\n\n{figures.source()}"


def never_slower(results: Path) -> str:
    """How many lines were below dense, and whether the guard knew."""
    figures = newest(results, "linears")
    if figures is None:
        return missing("cpu.py")
    timed = [line for line in figures.lines if line["ratio"]]
    below = [line for line in timed if line["ratio"] < LEVEL]
    asked = [line for line in timed if line["guard"]]
    chosen = [line for line in asked if line["guard"] == "sparse"]
    least = min((line["ratio"] for line in chosen), default=1.0)
    wrong = [line for line in chosen if line["ratio"] < LEVEL]
    return (
        f"Of {len(timed)} lines {len(below)} are below {LEVEL} of dense, kernel against dense. "
        f"The guard was asked about {len(asked)} of them, by a measurement of its own: it would "
        f"run {len(chosen)} sparse, of which the slowest is at {least:.2f}, {len(wrong)} below "
        f"{LEVEL}; all others run dense."
    )


def compiled(results: Path) -> str:
    """Whole compiled graphs over all numbers of rows: the worst of each range."""
    figures = newest(results, "never-slower")
    if figures is None:
        return missing("never_slower.py")
    found: dict[str, dict[int, float]] = {}
    for line in figures.lines:
        ratios = found.setdefault(line["layer"], {})
        until = next(end for end in RANGES if line["rows"] <= end)
        ratios[until] = min(line["ratio"], ratios.get(until, line["ratio"]))
    rows = [(layer, *(ratios.get(end) for end in RANGES)) for layer, ratios in found.items()]
    worst = min(line["ratio"] for line in figures.lines)
    head = ("layer", *(f"to {end} rows" for end in RANGES))
    return f"The worst: {worst:.3f}.\n\n{table(head, rows)}\n\n{figures.source()}"


def plots(results: Path) -> str:
    """Links to what `charts` draws."""
    links = [f"![{name[:-4].replace('_', ' ')}]({name})" for name in charts(results)]
    return "\n".join(links) or missing("cpu.py")


CPU_BLOCKS: dict[str, Callable[[Path], str]] = {
    "cpu-goals": goals,
    "cpu-rows": ladder,
    "cpu-plots": plots,
    "cpu-crossovers": crossovers,
    "cpu-guard": never_slower,
    "cpu-compiled": compiled,
}


def charts(results: Path) -> dict[str, str]:
    """File name -> SVG: speed-up over rows for each value type, and over sparsity."""
    figures = newest(results, "linears")
    if figures is None:
        return {}
    ratios = _ratios(figures, BIG)
    found = {}
    for value_type in dict.fromkeys(key[0] for key in ratios):
        curves: dict[str, Points] = {
            f"{pattern} {values}".strip(): list(each.items())
            for (of, values, pattern), each in ratios.items()
            if of == value_type and values != "int8"  # beside int8_dynamic: the table has it
        }
        title = f"{value_type}, 4096 x 4096: speed-up over the best dense {value_type}"
        found[f"performance_rows_{value_type}.svg"] = chart(title, "rows of x", curves)
    found["performance_sparsity.svg"] = _over_sparsity(ratios)
    return found


def _over_sparsity(ratios: dict[Key, dict[int, float]]) -> str:
    curves: dict[str, list[tuple[float, float]]] = {}
    for (value_type, values, pattern), each in ratios.items():
        if pattern.startswith("bitmap") and values != "int8":
            sparsity = float(pattern.split()[1])
            for rows in (1, 64):
                if rows in each:
                    name = f"{value_type}, {rows} row{'s' * (rows > 1)}"
                    curves.setdefault(name, []).append((sparsity, each[rows]))
    title = "bitmap, 4096 x 4096: speed-up over the best dense of the type"
    return chart(title, "% of weights that are zero", curves, is_logarithmic=False)
