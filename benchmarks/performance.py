"""Rewrites the tables and plots of docs/performance.md from the newest files in benchmarks/results.

    python benchmarks/performance.py              or: make performance
    python benchmarks/performance.py --measure    takes all figures again first: an hour, alone
    python benchmarks/performance.py --measure linears-quick models         these kinds only

What stands between `<!-- name:begin -->` and `<!-- name:end -->` is generated, all other text kept.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks`, when run as a script

from benchmarks.performance_cpu import CPU_BLOCKS, charts
from benchmarks.performance_gpu import GPU_BLOCKS
from benchmarks.performance_models import MODEL_BLOCKS
from benchmarks.results_files import RESULTS
from sparsefx.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
BLOCKS = {**CPU_BLOCKS, **GPU_BLOCKS, **MODEL_BLOCKS}
# script and flags -> the kind of its results file
RUNS = {
    ("cpu.py", "--quick", "--seconds", "3"): "linears-quick",
    ("cpu.py",): "linears",
    ("never_slower.py",): "never-slower",
    ("linear.py",): "linear-llama",
    ("model.py",): "models",
    ("recipes.py",): "recipes",
    ("ort_library.py",): "encoder",
}


def main(arguments: list[str] | None = None) -> None:
    """Writes the page and its plots."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--measure", nargs="*", choices=[*RUNS.values()], help="run these benchmarks first (all)"
    )
    options = parser.parse_args(arguments)
    failed = [] if options.measure is None else measure(options.measure or list(RUNS.values()))
    for name, text in files(PAGE.read_text(), RESULTS).items():
        write_atomically(PAGE.parent / name, text.encode())
    if failed:
        raise SystemExit(f"these failed, their figures are the old ones: {', '.join(failed)}")


def files(page: str, results: Path) -> dict[str, str]:
    """Name in docs/ -> text: the page with its blocks filled from `results`, and the plots."""
    for name, block in BLOCKS.items():
        page = filled(page, name, block(results))
    return {PAGE.name: page, **charts(results)}


def filled(page: str, name: str, text: str) -> str:
    """`page` with `text` between the marks of `name`. Raises ValueError if they are not there."""
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"the page needs {begin!r} and {end!r}, each once")
    before, _, rest = page.partition(begin)
    return f"{before}{begin}{text.strip()}\n{end}{rest.partition(end)[2]}"


def measure(kinds: Sequence[str]) -> list[str]:
    """Runs the benchmarks of these kinds and keeps their figures; returns those that failed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    date = datetime.now(UTC).date().isoformat()
    failed = []
    for (script, *flags), kind in RUNS.items():
        if kind in kinds:
            target = RESULTS / f"{kind}-{device}-{date}.json"
            command = [sys.executable, str(ROOT / "benchmarks" / script), *flags]
            done = subprocess.run([*command, "--json", str(target)], check=False)
            failed += [kind] * bool(done.returncode)
    return failed


if __name__ == "__main__":
    main()
