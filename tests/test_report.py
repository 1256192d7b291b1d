"""The report: nothing silent, the same in text, JSON and HTML, and safe to open."""

import json
import re
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sparsefx import report_text
from sparsefx.errors import InvalidReport
from sparsefx.report import Report, Row

HOSTILE = "layer.<script>alert('x')</script>.\"&${rows}$$[red]\x1b[31m\u202e"

LOWERED = Row(
    name="model.layers.0.mlp.up_proj",
    op="linear",
    shape="1536x576 @ 128..",
    pattern="2:4",
    kernel="cpp nm_linear",
    dense_us=200.0,
    sparse_us=100.0,
    how="measured",
    error=2e-7,
    dense_bytes=4000,
    stored_bytes=2250,
)
SLOWER = replace(
    LOWERED,
    name="model.layers.0.mlp.down_proj",
    kernel="",
    dense_us=300.0,
    sparse_us=600.0,
    reason="the sparse kernel is not faster than dense (measured)",
    stored_bytes=0,
)
DENSE = Row(name="lm_head", op="linear", reason="no zeros", dense_bytes=1000, stored_bytes=1000)
MODELLED = replace(LOWERED, name="b", how="modelled", error=None, kernel="triton nm_linear")


def sample() -> Report:
    return Report(
        "Llama", [LOWERED, SLOWER, DENSE, MODELLED], {"target": "cpu", "guard": "measure"}
    )


def long() -> Report:
    rows = [
        replace(row, name=f"model.layers.{at}.{row.name.rpartition('.')[2]}", graph=at % 2)
        for at in range(53)
        for row in (LOWERED, SLOWER, DENSE, MODELLED)
    ]
    return Report("Llama", rows)


class Page(HTMLParser):
    """Collects the tags, attributes, rows and visible text of a page; notes tags left open."""

    VOID = frozenset({"meta", "input", "link", "br", "wbr", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def html(report: Report, folder: Path) -> str:
    report.to_html(folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def test_totals_add_up() -> None:
    totals = sample().totals
    assert (totals.candidates, totals.lowered, totals.declined) == (4, 2, 2)
    assert dict(totals.kernels) == {"cpp nm_linear": 1, "triton nm_linear": 1}
    assert dict(totals.reasons) == {SLOWER.reason: 1, "no zeros": 1}
    assert totals.timed == 3
    assert totals.dense_us == 200 + 300 + 200
    assert totals.chosen_us == 100 + 300 + 100, "a declined node runs dense"
    assert totals.speedup == pytest.approx(1.4)
    assert totals.dense_bytes == 4000 * 3 + 1000
    assert totals.stored_bytes == 2250 * 2 + 4000 + 1000, "a row without stored bytes is dense"
    assert totals.error == 2e-7
    assert dict(totals.how) == {"measured": 2, "modelled": 1}


def test_totals_of_nothing() -> None:
    totals = Report("empty").totals
    assert (totals.candidates, totals.timed, totals.speedup, totals.error) == (0, 0, None, None)


def test_check_finds_nothing_in_a_good_report() -> None:
    assert sample().check() == []
    without_times = replace(LOWERED, dense_us=None, sparse_us=None, how="", reason="guard is off")
    assert Report("off", [without_times]).check() == []


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (replace(DENSE, reason=""), "without a reason"),
        (replace(LOWERED, dense_us=None), "neither two times nor a reason"),
        (replace(LOWERED, sparse_us=None), "neither two times nor a reason"),
        (replace(LOWERED, sparse_us=float("nan")), "sparse_us is nan"),
        (replace(LOWERED, dense_us=float("inf")), "dense_us is inf"),
        (replace(LOWERED, error=-1.0), "error is -1.0"),
        (replace(LOWERED, how="guessed"), "how is 'guessed'"),
        (replace(LOWERED, how=""), "how it was found"),
        (replace(DENSE, stored_bytes=-1), "negative"),
    ],
)
def test_check_names_each_violation(row: Row, complaint: str) -> None:
    (found,) = Report("bad", [LOWERED, row]).check()
    assert complaint in found
    assert found.startswith(f"{row.name} (graph 0)")


@pytest.mark.parametrize("columns", ["20", "100", "120", "143", "144", "160", "500"])
def test_text_fits_and_has_every_row(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    report = long()
    text = str(report)
    width = min(max(int(columns), report_text.NARROWEST), report_text.WIDEST)
    assert max(len(line) for line in text.splitlines()) <= width
    solid = "".join(text.split())  # names may be folded over two lines
    assert text.count("cpp nm_linear") == 53 + 1, "each row and the totals"
    assert solid.count("down_proj") == 53
    assert text.count("2.00x") == 106
    assert text.count("~2.00x") == 53
    roomy = width >= report_text.ROOMY
    assert re.findall(r"\b56%", text) == ["56%"] * (106 if roomy else 0), "the last column"
    assert text.count("53 x ") == 2, "each reason with its count"


def test_text_has_totals_reasons_and_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    text = str(sample())
    for part in (
        "Llama",
        "guard: measure",
        "4 candidates: 2 sparse (cpp nm_linear 1, triton nm_linear 1), 2 dense",
        "[1] 1 x the sparse kernel is not faster than dense (measured)",
        "[2] 1 x no zeros",
        "700 us dense -> 500 us now (1.40x); 2 measured, 1 modelled, 1 without times",
        "13 kB dense -> 9.5 kB now (73%)",
        "largest error of a chosen kernel: 2.0e-07",
    ):
        assert part in text
    (row,) = (line for line in text.splitlines() if line.startswith("lm_head"))
    assert "dense [2]" in row


def test_text_of_an_empty_report() -> None:
    assert "0 candidates" in str(Report("empty"))


def test_json_round_trip(tmp_path: Path) -> None:
    report = sample()
    report.rows.append(replace(DENSE, name=HOSTILE))
    report.to_json(tmp_path / "report.json")
    assert Report.from_json(tmp_path / "report.json") == report


def test_a_quantised_dense_time_is_told_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # no line of the table is broken
    rows = [replace(LOWERED, quantised_us=310.4), replace(SLOWER, quantised_us=77.0), MODELLED]
    report = Report("Llama", rows)
    assert report.check() == []
    text = " ".join(str(report).split())
    page = " ".join(Page(html(report, tmp_path)).text)
    for told in (text, page):
        assert told.count("quantised dense") == 2
    assert "quantised dense 310 us" in page and "quantised dense 77 us" in page
    assert replace(report.totals, error=None) == replace(
        Report("x", [LOWERED, SLOWER, MODELLED]).totals, error=None
    ), "it is no bar"
    (complaint,) = Report("bad", [replace(LOWERED, quantised_us=-1.0)]).check()
    assert "quantised_us is -1.0" in complaint


def test_nan_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with pytest.raises(ValueError, match="not JSON compliant"):
        Report("bad", [replace(LOWERED, dense_us=float("nan"))]).to_json(path)
    assert list(tmp_path.iterdir()) == []


def _edit(change: str) -> bytes:
    data = {"version": 4, "title": "t", "facts": {}, "rows": [{f.name: "" for f in fields(Row)}]}
    match change:
        case "version":
            data["version"] = 5
        case "title":
            data["title"] = None
        case "facts":
            data["facts"] = {"target": 3}
        case "field":
            data["rows"] = [{"name": "x"}]
        case "rows":
            data["rows"] = [3]
    return json.dumps(data).encode()


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "version 1 or 2 or 3 or 4"),
        (_edit("version"), "version 1 or 2 or 3 or 4"),
        (_edit("title"), "title"),
        (_edit("facts"), "fact"),
        (_edit("field"), "fields"),
        (_edit("rows"), "fields"),
        (_edit("type"), "graph of a row is ''"),
    ],
)
def test_a_damaged_report_is_one_typed_error(tmp_path: Path, content: bytes, rule: str) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(InvalidReport, match=rule) as caught:
        Report.from_json(path)
    assert "report.json" in str(caught.value)


def test_html_has_every_row_and_total(tmp_path: Path) -> None:
    report = long()
    text = html(report, tmp_path)
    page = Page(text)
    assert page.open == []
    assert page.tags.count("tr") == len(report.rows) + 1
    shown = "".join(page.text)
    assert all(f"{row.name} (graph {row.graph})" in shown for row in report.rows)
    assert shown.count(SLOWER.reason) == 53 + 1, "in each row and in the list of reasons"
    assert f"{report.totals.lowered} of {len(report.rows)}" in shown
    timed = [row for row in report.rows if row.speedup]
    bars = re.findall(r'<rect class="(\w+)" x=', text)
    assert bars.count("sparse") == sum(bool(row.kernel) for row in timed)
    assert bars.count("dense") == sum(not row.kernel for row in timed)


def test_html_is_self_contained(tmp_path: Path) -> None:
    page = Page(html(sample(), tmp_path))
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {"src", "href", "srcset", "action", "data", "background"} & names
    assert not any(name.startswith("on") for name in names)
    text = "".join(page.text)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch\(|XMLHttpRequest", text)
    policy = dict(page.attributes)["content"] or ""
    assert any("default-src 'none'" in (value or "") for _, value in page.attributes), policy


@pytest.mark.parametrize("field", ["name", "op", "shape", "pattern", "kernel", "how", "reason"])
def test_html_shows_hostile_text_as_text(tmp_path: Path, field: str) -> None:
    clean = Page(html(sample(), tmp_path))
    report = sample()
    changed = {field: HOSTILE}
    report.rows[0] = replace(report.rows[0], **changed)  # type: ignore[arg-type]  # str fields all
    text = html(report, tmp_path)
    page = Page(text)
    assert page.open == []
    kinds = set(page.tags) - {"wbr"}
    assert kinds == set(clean.tags) - {"wbr"}
    assert page.tags.count("script") == 1
    assert "<script>alert" not in text
    assert "<script>alert('x')</script>" in "".join(page.text)
    assert "${rows}$$" in "".join(page.text), "the text is not read as a placeholder"
    assert "\x1b" not in text and "\u202e" not in text


def test_html_escapes_title_and_facts(tmp_path: Path) -> None:
    text = html(Report(HOSTILE, [LOWERED], {HOSTILE: HOSTILE}), tmp_path)
    assert Page(text).open == []
    assert "<script>alert" not in text


def test_text_cannot_drive_the_terminal() -> None:
    text = str(Report(HOSTILE, [replace(DENSE, name=HOSTILE, reason=HOSTILE)], {"a": HOSTILE}))
    assert "\x1b" not in text and "\u202e" not in text
    assert "[red]" in text, "rich markup is not read"


def test_html_of_an_empty_report(tmp_path: Path) -> None:
    page = Page(html(Report("empty"), tmp_path))
    assert page.open == []
    assert "0 of 0" in "".join(page.text)


def test_html_of_extreme_ratios(tmp_path: Path) -> None:
    rows = [
        replace(LOWERED, dense_us=1e9, sparse_us=1e-3),
        replace(SLOWER, dense_us=1e-3, sparse_us=1e9),
        replace(SLOWER, dense_us=0.0),
    ]
    text = html(Report("extreme", rows), tmp_path)
    heights = [
        float(height) for height in re.findall(r'<rect class="\w+" x=.*?height="([^"]+)"', text)
    ]
    assert len(heights) == 2
    assert all(0 < height <= 200 for height in heights)
