"""Every example and benchmark of a model runs as documented, at its smallest size."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sparsefx import Report

ROOT = Path(__file__).resolve().parents[1]
# Examples that are not named here run without flags.
FLAGS = {
    "compile_smollm2.py": ["--quick", "--inductor", "--tokens", "4", "--out", "out"],
    "sparse_attention.py": ["--layers", "2", "--length", "512", "--batches", "2"],
}
SCRIPTS = sorted(
    path.name for path in (ROOT / "examples").glob("*.py") if "__main__" in path.read_text()
)
DEMO = "compile_smollm2.py"


def run(script: str, folder: Path, *flags: str) -> str:
    """What `script` prints when run in `folder` as a user would, Triton's interpreter off."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *flags],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, f"{script} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, f"{pattern!r} not in:\n{text}"
    return float(found[1].replace(",", ""))


@pytest.mark.slow
@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != DEMO])
def test_example_runs(script: str, tmp_path: Path) -> None:
    assert run(f"examples/{script}", tmp_path, *FLAGS.get(script, []))


@pytest.mark.slow
def test_demo_shows_every_step(tmp_path: Path) -> None:
    text = run(f"examples/{DEMO}", tmp_path, *FLAGS[DEMO])
    assert number(r"same weights: (\S+) of the largest logit", text) < 1e-4
    largest = number(r"\(largest logit (\S+)\)", text)
    assert number(r"onnxruntime - PyTorch\|: (\S+)", text) < 1e-4 * largest
    lines = [f"{w}, {c}" for w in ("dense", "pruned") for c in ("eager", "Inductor")]
    for line in (*lines, "pruned, SparseFX"):
        assert number(rf"{line} .* ([\d.,]+)\n", text) > 0
    assert "without training" in text
    assert number(r"ONNX file: (\d+) MB", text) < number(r"dense weights (\d+) MB", text)
    report = Report.from_json(tmp_path / "out" / "report.json")
    # Two graphs of two layers of seven linears and one attention, and the head.
    assert len(report.rows) == 2 * (2 * 8 + 1)
    assert report.check() == []
    assert "model.layers.1.mlp.down_proj" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_model_benchmark_keeps_its_figures(tmp_path: Path) -> None:
    flags = ("--layers", "1", "--prompt", "16", "--rounds", "3", "--dtype", "fp32")
    run("benchmarks/model.py", tmp_path, *flags, "--json", "figures.json")
    kept = json.loads((tmp_path / "figures.json").read_text())
    assert {"date", "processor", "torch", "sparsefx"} <= set(kept["machine"])
    cases = [(result["weights"], result["phase"]) for result in kept["results"]]
    assert cases == [(w, p) for w in ("dense", "pruned") for p in ("prefill", "decode")]
    for result in kept["results"]:
        ratio = result["ratios"]["Inductor fp32"]
        assert ratio["low"] <= ratio["ratio"] <= ratio["high"]
        assert result["difference"] < 1e-4
        assert result["weights"] == "pruned" or result["kernels"] == 0


@pytest.mark.slow
def test_compile_time_benchmark_keeps_its_figures(tmp_path: Path) -> None:
    run("benchmarks/compile_time.py", tmp_path, "--layers", "1", "--json", "figures.json")
    (result,) = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert 0 < result["own seconds"] < result["seconds with Inductor"]
    assert result["peak MB beyond the model, Inductor included"] > 0


# attention_plot.py needs matplotlib, which nothing else does.
BENCHMARKS = sorted(
    path.name
    for path in (ROOT / "benchmarks").glob("*.py")
    if "__main__" in path.read_text() and path.name != "attention_plot.py"
)


@pytest.mark.slow
@pytest.mark.parametrize("script", BENCHMARKS)
def test_benchmark_starts_from_any_folder(script: str, tmp_path: Path) -> None:
    assert "usage:" in run(f"benchmarks/{script}", tmp_path, "--help")
