"""The speed benchmarks run at their smallest sizes, and docs/performance.md is what they left."""

import itertools
import json
from pathlib import Path

import pytest

from benchmarks import chart, cpu, performance, results_files, turns
from tests.test_examples import run

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.mark.slow
def test_cpu_linears_are_right_and_keep_their_figures(tmp_path: Path) -> None:
    file = tmp_path / "linears-cpu-2026-01-01.json"
    flags = ("--shape", "128x256", "--rows", "1", "3", "--seconds", "0.01", "--json", str(file))
    cpu.main(list(flags))
    figures = results_files.newest(tmp_path, "linears")
    assert figures is not None and figures.options["peaks"]["bandwidth"] > 0
    timed = [line for line in figures.lines if line["ratio"]]
    assert {line["value_type"] for line in timed} >= {"fp32", "bf16"}
    for line in timed:
        assert line["error"] < 2e-2 and line["dense"] in line["dense_us"]
        assert line["sparse_us"] > 0 and line["fraction"] > 0
    assert all(line["reason"] for line in figures.lines if not line["ratio"])
    table = performance.CPU_BLOCKS["cpu-crossovers"](tmp_path)
    assert "128x256" in table and file.name in table


@pytest.mark.slow
def test_gpu_linears_are_right_in_the_interpreter(tmp_path: Path) -> None:
    run("benchmarks/linear.py", tmp_path, "--cpu", "--json", "figures.json")
    lines = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert {line["how"] for line in lines} == {"interpreted"}
    checked = [line for line in lines if line["error"] is not None]
    assert {line["storage"] for line in checked} >= {"2:4", "1:4", "bitmap 80 %"}
    assert all(line["reason"] for line in lines if line["error"] is None)


@pytest.mark.slow
def test_calls_are_timed_in_every_way(tmp_path: Path) -> None:
    run("benchmarks/dispatch.py", tmp_path, "--seconds", "0.1", "--json", "figures.json")
    lines = json.loads((tmp_path / "figures.json").read_text())["results"]
    assert [line.pop("where") for line in lines] == ["eager", "in a graph of Inductor"]
    names = [
        "dense",
        "dense as an operator",
        "kernel",
        "kernel by Python",
        "by rows",
        "by rows by Python",
    ]
    assert all([*line] == names for line in lines)
    assert all(each["least"] > 0 for each in lines[0].values())


def test_a_gpu_that_is_absent_is_planned_for(tmp_path: Path) -> None:
    file = tmp_path / "linear-llama-cpu-2026-01-01.json"
    run("benchmarks/linear.py", tmp_path, "--no-compile", "--json", str(file))
    lines = json.loads(file.read_text())["results"]
    assert {line["how"] for line in lines} == {"roofline"}
    assert all(line["error"] is None and line["fraction"] is None for line in lines)
    assert "Not measured" in performance.GPU_BLOCKS["gpu-goals"](tmp_path)


def test_the_page_is_in_step_with_the_figures() -> None:
    found = performance.files(performance.PAGE.read_text(), results_files.RESULTS)
    for name, text in found.items():
        assert (DOCS / name).read_text() == text, f"docs/{name}: run `make performance`"


def test_blocks_are_filled_and_other_text_kept() -> None:
    page = "a\n<!-- x:begin -->\nold\n<!-- x:end -->\nb\n"
    assert performance.filled(page, "x", "new\n") == page.replace("old", "new")
    with pytest.raises(ValueError, match="each once"):
        performance.filled(page, "y", "new")


def test_the_newest_file_of_a_kind_is_read(tmp_path: Path) -> None:
    for name in (
        "linears-cpu-2026-01-02",
        "linears-cpu-2025-12-31",
        "linears-quick-cpu-2026-02-01",
    ):
        content = {"machine": {}, "options": {}, "results": [{"name": name}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    found = results_files.newest(tmp_path, "linears")
    assert found is not None and found.lines == [{"name": "linears-cpu-2026-01-02"}]
    assert results_files.newest(tmp_path, "models") is None
    assert "Not measured" in performance.BLOCKS["model"](tmp_path)


def test_the_fastest_recipe_within_the_limit_is_named(tmp_path: Path) -> None:
    lines = [
        {
            "recipe": name,
            "says": "",
            "perplexity": 16.0 * ratio,
            "perplexity_ratio": ratio,
            "megabytes": 100.0,
            "kernels": 1,
            "ms": {"SparseFX": taken, "Inductor fp32": 60.0},
            "ratios": {"Inductor fp32": {"ratio": 60 / taken, "low": 1.0, "high": 9.0}},
        }
        for name, ratio, taken in (("slow", 1.0, 40.0), ("best", 1.1, 20.0), ("bad", 1.2, 10.0))
    ]
    machine = {
        "threads": "2",
        "load": "0.5 0.4 0.4 (1, 5, 15 minutes)",
        "processor": "x",
        "date": "2026-01-01",
        "torch": "",
        "onnxruntime": "",
    }
    content = {"machine": machine, "options": {"limit": 1.1}, "results": lines}
    (tmp_path / "recipes-cpu-2026-01-01.json").write_text(json.dumps(content))
    said = performance.BLOCKS["recipes"](tmp_path)
    assert said.startswith("The best within 1.1 x: **best**.") and "17.60 (1.100 x)" in said


def test_crossover_lies_between_the_points_around_one() -> None:
    assert chart.crossover([(1, 2.0), (4, 0.5)]) == pytest.approx(4 ** (2 / 3))
    assert chart.crossover([(1, 2.0), (8, 1.5)]) is None
    assert chart.crossover([(1, 0.9), (8, 1.5)]) == 1


def test_a_chart_names_its_curves_and_rings_the_crossover() -> None:
    drawn = chart.chart("a < b", "rows", {"2:4": [(1, 2.0), (64, 0.5)], "1:4": [(1, 4.0)]})
    assert "a &lt; b" in drawn and ">2:4<" in drawn and drawn.count("<circle") == 1


def test_rounds_run_every_side_in_turn_and_compare_within_a_round() -> None:
    order: list[str] = []
    clocks = {"a": itertools.count(2), "b": itertools.repeat(1)}

    def side(name: str) -> turns.Side:
        return turns.Side(name, [lambda: order.append(name)] * 2, per_call=2)

    def clock(call: turns.Call) -> float:
        call()
        return float(next(clocks[order[-1]]))

    times = turns.in_turns([side("a"), side("b")], 0, clock, fewest=3)
    assert times == {"a": [1.5, 2.0, 2.5], "b": [0.5, 0.5, 0.5]}
    assert turns.ratio(times["a"], times["b"]) == 4.0
    assert turns.fastest(times) == "b"
    assert order[4:] == ["a", "b", "b", "a", "a", "b"]  # after a first call and a guess of each
