"""The page of a report on a pruning: all layers and numbers, safe to open, with no script too."""

import math
import re
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import pytest

from sparsefx.prune.report.records import PruneReport
from tests.test_prune_report import FACTS, HEAD, QUERY, UP, html, long, sample
from tests.test_report import HOSTILE, Page


def test_html_has_every_layer_and_total(tmp_path: Path) -> None:
    report = long()
    text = html(report, tmp_path)
    page = Page(text)
    assert page.open == []
    assert page.tags.count("tr") == len(report.layers) + 1
    shown = "".join(page.text)
    assert all(layer.label in shown for layer in report.layers)
    assert "92.9 M of 186 M weights in 210 layers" in shown
    assert "0.204" in shown, "the mean error"
    assert "largest output error: 0.309 in model.layers.29.mlp.down_proj" in shown


def test_html_charts_have_a_bar_for_each_layer(tmp_path: Path) -> None:
    report = long()
    text = html(report, tmp_path)
    charts = text.split('<div class="plot">')[1:]
    assert len(charts) == 3
    bars = [re.findall(r'<rect class="(\w+)" data-at="(\d+)"', chart) for chart in charts]
    every = [str(at) for at in range(210)]
    assert [at for _, at in bars[0]] == every and {style for style, _ in bars[0]} == {"sparse"}
    assert [at for _, at in bars[1]] == every and {style for style, _ in bars[1]} == {"error"}
    for style in ("dense", "sparse"):
        assert [at for kind, at in bars[2] if kind == style] == every
    assert [chart.count('<rect class="band"') for chart in charts] == [15] * 3, "every other block"


def test_html_bars_are_as_high_as_their_numbers(tmp_path: Path) -> None:
    charts = html(sample(), tmp_path).split('<div class="plot">')[1:]
    pattern = r'<rect class="(\w+)" data-at="(\d)".*?height="([\d.]+)"'
    sparsity, errors, times = (re.findall(pattern, chart) for chart in charts)
    assert sparsity == [
        ("sparse", "0", "100.0"),
        ("missed", "1", "110.0"),
        ("sparse", "2", "140.0"),
    ]
    assert errors == [("error", "0", "50.0"), ("error", "1", "200.0")], "the axis ends at 0.4"
    # The axis ends at 250; the lower bar of a pair comes last, so that it stands in front.
    assert times == [
        ("dense", "0", "160.0"),
        ("sparse", "0", "80.0"),
        ("sparse", "1", "200.0"),
        ("dense", "1", "160.0"),
    ]


def test_html_names_the_blocks_under_a_chart(tmp_path: Path) -> None:
    def blocks(report: PruneReport) -> list[tuple[str, str, str]]:
        chart = html(report, tmp_path).split('<div class="plot">')[1]
        return re.findall(r'<span( class=minor)? style="left:([\d.]+)%">([^<]*)</span>', chart)

    few = blocks(long(4))
    assert [name for _, _, name in few] == ["0", "1", "2", "3"]
    assert [float(left) for _, left, _ in few] == [12.5, 37.5, 62.5, 87.5], "each in its middle"
    many = blocks(long(100))
    assert 10 < len(many) < 50, "not so many that they run into each other"
    assert len([minor for minor, _, _ in many if not minor]) <= 15, "fewer on a phone"
    stages = [replace(UP, block=f"layer{stage}.{n}") for stage in (1, 2) for n in (0, 1)]
    names = [name for _, _, name in blocks(PruneReport("ResNet", stages))]
    assert names == ["layer1.0", "layer1.1", "layer2.0", "layer2.1"], "0 alone would not tell"


def test_html_carries_the_heat_map_of_each_row(tmp_path: Path) -> None:
    text = html(sample(), tmp_path)
    maps = re.findall(r'data-shape="(\w+)" data-heat="([^"]*)"', text)
    assert len(maps) == 3
    assert maps[0][0] == "1536x576"
    cells = [
        tuple(int(line[n : n + 2], 16) / 200 for n in range(0, len(line), 2))
        for line in maps[0][1].split()
    ]
    assert tuple(cells) == UP.heat


def test_html_leaves_out_charts_without_numbers(tmp_path: Path) -> None:
    text = html(PruneReport("data-free", [HEAD]), tmp_path)
    assert text.count('<div class="plot">') == 1
    assert "What stands out" not in text


def test_html_offers_the_missed_layers_where_there_are_some(tmp_path: Path) -> None:
    assert '<option value="missed">' in html(sample(), tmp_path)
    assert html(sample(), tmp_path).count('<tr data-fate="missed"') == 1
    assert '<option value="missed">' not in html(long(2), tmp_path)


def test_html_is_self_contained(tmp_path: Path) -> None:
    page = Page(html(sample(), tmp_path))
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    attributes = {name for name, _ in page.attributes}
    assert not {"src", "href", "srcset", "action", "data", "background"} & attributes
    assert not any(name.startswith("on") for name in attributes)
    text = "".join(page.text).replace("http://www.w3.org/2000/svg", "")  # a name, not an address
    assert not re.search(r"https?:|//[a-z]|@import|url\(|fetch\(|XMLHttpRequest", text)
    assert any("default-src 'none'" in (value or "") for _, value in page.attributes)


def test_html_has_the_scripts_as_they_are_written(tmp_path: Path) -> None:
    folder = files("sparsefx.prune.report")
    text = html(sample(), tmp_path)
    for name in ("page.js", "page.css"):
        assert folder.joinpath(name).read_text(encoding="utf-8") in text
    script = folder.joinpath("page.js").read_text(encoding="utf-8")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script), (
        "texts of the model go into the page as text only"
    )


@pytest.mark.parametrize("field", ["name", "block", "pattern", "criterion"])
def test_html_shows_hostile_text_as_text(tmp_path: Path, field: str) -> None:
    clean = Page(html(sample(), tmp_path))
    changed = {field: HOSTILE}
    layer = replace(QUERY, **changed)  # type: ignore[arg-type]  # str fields all
    text = html(PruneReport("Llama", [UP, layer, HEAD], FACTS), tmp_path)
    page = Page(text)
    assert page.open == []
    assert set(page.tags) - {"wbr"} == set(clean.tags) - {"wbr"}
    assert page.tags.count("script") == 1
    assert "<script>alert" not in text
    assert "<script>alert('x')</script>" in "".join(page.text)
    assert "\x1b" not in text and "\u202e" not in text


def test_html_escapes_title_and_facts(tmp_path: Path) -> None:
    text = html(PruneReport(HOSTILE, [UP], {HOSTILE: HOSTILE}), tmp_path)
    assert Page(text).open == []
    assert "<script>alert" not in text


def test_html_of_an_empty_report(tmp_path: Path) -> None:
    page = Page(html(PruneReport("empty"), tmp_path))
    assert page.open == []
    assert "0 layers" in "".join(page.text)


@pytest.mark.parametrize("error", [0.0, 5e-324, 1e308, math.inf, math.nan])
def test_html_of_extreme_numbers(tmp_path: Path, error: float) -> None:
    shares = {"reached": error, "asked": error, "heat": ((error, 0.5),)}
    layers = [replace(UP, error=error, dense_us=error, sparse_us=1.0, **shares), QUERY]
    report = PruneReport("extreme", layers)
    text = html(report, tmp_path)
    assert str(report)
    assert Page(text).open == []
    heights = [float(height) for height in re.findall(r'data-at=.*?height="([^"]+)"', text)]
    assert heights
    assert all(0 < height <= 200 for height in heights)
