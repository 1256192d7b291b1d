"""Attention in the report: a table of its own, the same facts in text, JSON and HTML."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sparsefx import report_text
from sparsefx.errors import InvalidReport
from sparsefx.report import Report, Row
from tests.test_report import DENSE, HOSTILE, LOWERED, Page, html

THRESHOLDS = "prefill factors 3.1..420, decode 0.4..33, R2 0.98, calibrated 128..2048 keys"
SKIPPING = Row(
    name="model.layers.0.self_attn",
    op="attention",
    shape="9/3 x 64 @ 2048..",
    pattern="skip_softmax 70%",
    kernel="triton_skip_softmax",
    dense_us=1234.0,
    sparse_us=823.0,
    how="measured",
    error=2.1e-3,
    skipped=0.6843,
    lost_mass=4.12e-3,
    crossover=16384,
    thresholds=THRESHOLDS,
)
REASON = "below 16384 keys the kernel is not faster than dense; " + "and that is a long story " * 9
DECLINED = replace(
    SKIPPING,
    name="model.layers.1.self_attn",
    kernel="",
    reason=REASON,
    how="modelled",
    skipped=None,
    lost_mass=None,
    crossover=None,
)
WIDTHS = ["20", "100", "120", "143", "144", "160", "500"]


def model(layers: int) -> Report:
    """Each layer has an attention, in two graphs, and a linear."""
    rows = [
        replace(row, name=f"model.layers.{at}.{row.name.rpartition('.')[2]}", graph=graph)
        for at in range(layers)
        for row in (SKIPPING if at % 2 else DECLINED, LOWERED)
        for graph in (0, 1)
    ]
    return Report("Llama", rows, {"target": "cpu"})


@pytest.mark.parametrize("columns", WIDTHS)
def test_text_fits_and_has_every_fact(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    text = str(model(32))
    width = min(max(int(columns), report_text.NARROWEST), report_text.WIDEST)
    assert max(len(line) for line in text.splitlines()) <= width
    solid = "".join(text.split())  # cells may be folded over lines
    for fact, count in (("68.4%", 32), ("4.1e-03", 32), ("16384", 33), ("~1.50x", 32)):
        assert text.count(fact) == count, fact
    assert solid.count("self_attn") == 64 + 32, "each row, and each attention's thresholds once"
    assert solid.count("".join(THRESHOLDS.split())) == 32
    assert text.count("triton_skip_softmax") == 32 + 1, "each row and the totals"
    assert text.count("dense [1]") == 32
    assert solid.count("".join(REASON.split())) == 1
    assert solid.count("up_proj") == 64
    assert solid.count("fewestkeysthatrunthekernel") == 1


@pytest.mark.parametrize("columns", WIDTHS)
def test_linears_are_printed_as_without_attention(
    columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    plain = Report("Llama", [LOWERED, replace(DENSE, op="attention")])
    mixed = Report("Llama", [LOWERED, replace(DENSE, op="attention"), SKIPPING])
    for line in str(plain).splitlines()[:6]:
        assert line in str(mixed).splitlines()
    assert "lost" not in str(plain)
    assert "thresholds:" not in str(plain)


def test_text_of_attention_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    lines = str(Report("Llama", [SKIPPING, DECLINED])).splitlines()
    head, first, second = (line.split() for line in lines[2:5])
    assert head == [
        "node",
        "shape",
        "pattern",
        "runs",
        "skipped",
        "lost",
        "error",
        "from",
        "dense",
        "sparse",
        "gain",
    ]
    assert first[-7:] == ["68.4%", "4.1e-03", "2.1e-03", "16384", "1234", "823", "1.50x"]
    assert second[-6:] == ["dense", "[1]", "2.1e-03", "1234", "823", "~1.50x"]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"skipped": 1.01}, "skipped is 1.01, no share"),
        ({"skipped": -0.1}, "skipped is -0.1, no share"),
        ({"skipped": float("nan")}, "skipped is nan, no share"),
        ({"lost_mass": float("inf")}, "lost_mass is inf, no share"),
        ({"lost_mass": -1e-3}, "lost_mass is -0.001, no share"),
        ({"crossover": -1}, "crossover is -1"),
    ],
)
def test_check_names_each_violation(changes: dict[str, float], complaint: str) -> None:
    row = replace(SKIPPING, **changes)  # type: ignore[arg-type]  # numbers of these fields
    assert Report("bad", [SKIPPING, DECLINED, row]).check() == [
        f"model.layers.0.self_attn (graph 0): {complaint}"
    ]


def test_json_round_trip(tmp_path: Path) -> None:
    report = model(3)
    report.to_json(tmp_path / "report.json")
    assert Report.from_json(tmp_path / "report.json") == report


NEW = {
    1: (
        *("skipped", "lost_mass", "crossover", "thresholds"),
        *("by_rows", "kept_bytes", "merged", "quantised_us"),
    ),
    2: ("by_rows", "kept_bytes", "merged", "quantised_us"),
    3: ("quantised_us",),
}


@pytest.mark.parametrize("version", NEW)
def test_a_report_of_an_older_version_is_read(tmp_path: Path, version: int) -> None:
    path = tmp_path / "report.json"
    report = Report("Llama", [LOWERED, DENSE])
    report.to_json(path)
    data = json.loads(path.read_text())
    assert data["version"] == 4
    data["version"] = version
    path.write_text(json.dumps(data))
    with pytest.raises(InvalidReport, match="does not have the fields"):
        Report.from_json(path)
    new = NEW[version]
    data["rows"] = [
        {name: value for name, value in row.items() if name not in new} for row in data["rows"]
    ]
    path.write_text(json.dumps(data))
    assert Report.from_json(path) == report
    data["version"] = 4
    path.write_text(json.dumps(data))
    with pytest.raises(InvalidReport, match="does not have the fields.*quantised_us"):
        Report.from_json(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("skipped", "0.5"), ("skipped", True), ("crossover", 1.5), ("thresholds", None)],
)
def test_json_of_wrong_types_is_refused(tmp_path: Path, field: str, value: object) -> None:
    path = tmp_path / "report.json"
    Report("Llama", [SKIPPING]).to_json(path)
    data = json.loads(path.read_text())
    data["rows"][0][field] = value
    path.write_text(json.dumps(data))
    with pytest.raises(InvalidReport, match=f"{field} of a row is"):
        Report.from_json(path)


def test_html_has_both_tables_and_every_fact(tmp_path: Path) -> None:
    report = model(4)
    page = Page(html(report, tmp_path))
    assert page.open == []
    assert page.tags.count("table") == 2
    assert page.tags.count("tr") == len(report.rows) + 2
    shown = "".join(page.text)
    for fact, count in ((THRESHOLDS, 8), ("68.4%", 4), ("4.1e-03", 4), (REASON.strip(), 5)):
        assert shown.count(fact) == count, fact
    labels = [value for name, value in page.attributes if name == "data-label"]
    assert labels.count("lost mass") == labels.count("from keys") == 8
    assert labels.count("stored") == 8
    assert ("data-value", "16384") in page.attributes


def test_html_without_thresholds_has_one_table(tmp_path: Path) -> None:
    page = Page(html(Report("Llama", [LOWERED]), tmp_path))
    assert page.tags.count("table") == 1
    assert "caption" not in page.tags


def test_hostile_thresholds_are_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    hostile = replace(SKIPPING, thresholds=HOSTILE)
    text = html(Report("t", [hostile]), tmp_path)
    assert Page(text).open == []
    assert Page(text).tags.count("script") == 1
    assert "<script>alert('x')</script>" in "".join(Page(text).text)
    for shown in (text, str(Report("t", [hostile]))):
        assert "\x1b" not in shown and "\u202e" not in shown
