"""The report on a pruning: sums that add up, the same in text, JSON and HTML, and safe to open."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsefx import report_text
from sparsefx import report_words as words
from sparsefx.errors import InvalidReport
from sparsefx.prune.report.layers import CELLS
from sparsefx.prune.report.records import PrunedLayer, PruneReport, heat_of
from sparsefx.report import Report
from tests.test_report import HOSTILE, Page

UP = PrunedLayer(
    name="model.layers.0.mlp.up_proj.weight",
    block="model.layers.0",
    shape=(1536, 576),
    pattern="2:4",
    criterion="SparseGPT",
    asked=0.5,
    reached=0.5,
    error=0.1,
    seconds=2.0,
    dense_bytes=4000,
    stored_bytes=2250,
    dense_us=200.0,
    sparse_us=100.0,
    heat=((0.5, 0.5), (0.25, 0.75)),
)
QUERY = replace(
    UP,
    name="model.layers.0.self_attn.q_proj.weight",
    shape=(576, 576),
    pattern="unstructured 60%",
    criterion="Wanda",
    asked=0.6,
    reached=0.55,
    error=0.4,
    sparse_us=250.0,
)
HEAD = replace(
    UP, name="head", block="", asked=0.7, reached=0.7, error=None, dense_us=None, sparse_us=None
)
FACTS = {"target": "cuda sm_90", "calibration": "32 x 512 tokens"}


def sample() -> PruneReport:
    return PruneReport("Llama", [UP, QUERY, HEAD], dict(FACTS))


def long(blocks: int = 30) -> PruneReport:
    """7 layers a block, as in a Llama; each has another error."""
    parts = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up")]
    layers = [
        replace(UP, name=f"model.layers.{at}.{part}.weight", block=f"model.layers.{at}")
        for at in range(blocks)
        for part in (*parts, "mlp.down_proj")
    ]
    layers = [replace(layer, error=0.1 + n / 1e3) for n, layer in enumerate(layers)]
    return PruneReport("Llama", layers)


def html(report: PruneReport, folder: Path) -> str:
    report.to_html(folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def cells_of(side: int) -> list[range]:
    """Cells of 1 up to 32, beyond that of the fewest whole eights that make 32 cells at most."""
    size = 1 if side <= 32 else next(n for n in range(8, side + 8, 8) if 32 * n >= side)
    return [range(start, min(start + size, side)) for start in range(0, side, size)]


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (32, 32), (33, 7), (70, 129), (9, 300)])
def test_heat_is_the_share_kept_in_each_cell(shape: tuple[int, int]) -> None:
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.4
    heat = heat_of(keep)
    rows, columns = cells_of(shape[0]), cells_of(shape[1])
    assert len(heat) == len(rows) <= CELLS
    for row, line in zip(rows, heat, strict=True):
        assert len(line) == len(columns) <= CELLS
        for column, share in zip(columns, line, strict=True):
            cell = [bool(keep[y, x]) for y in row for x in column]
            assert share == pytest.approx(sum(cell) / len(cell), abs=5e-5)


@pytest.mark.parametrize("width", [40, 144, 576, 1536, 4096])
def test_heat_of_a_regular_pattern_is_even(width: int) -> None:
    groups = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1]], dtype=torch.bool)
    keep = groups.repeat(20, width // 4)
    assert {share for row in heat_of(keep) for share in row} == {0.5}


def test_heat_shows_where_weights_stayed() -> None:
    keep = torch.zeros(64, 64, dtype=torch.bool)
    keep[:8, 56:] = True
    heat = heat_of(keep)
    assert heat[0][-1] == 1.0
    assert sum(share for row in heat for share in row) == 1.0


def test_totals_add_up() -> None:
    totals = sample().totals
    sizes = [1536 * 576, 576 * 576, 1536 * 576]
    assert totals.layers == 3
    assert totals.weights == sum(sizes)
    zeros = 0.5 * sizes[0] + 0.55 * sizes[1] + 0.7 * sizes[2]
    assert totals.zeros == pytest.approx(zeros, abs=2)
    assert totals.reached == pytest.approx(zeros / sum(sizes)), "weighted by size"
    asked = 0.5 * sizes[0] + 0.6 * sizes[1] + 0.7 * sizes[2]
    assert totals.asked == pytest.approx(asked / sum(sizes))
    assert totals.mean_error == pytest.approx(0.25), "of the two layers that have one"
    assert totals.worst == QUERY
    assert totals.seconds == 6.0
    assert (totals.dense_bytes, totals.stored_bytes) == (12000, 6750)
    assert (totals.predicted, totals.dense_us, totals.sparse_us) == (2, 400.0, 350.0)
    assert totals.gain == pytest.approx(400 / 350)


def test_totals_of_nothing() -> None:
    totals = PruneReport("empty").totals
    assert (totals.layers, totals.weights, totals.reached, totals.predicted) == (0, 0, 0.0, 0)
    assert (totals.mean_error, totals.worst, totals.gain) == (None, None, None)


def test_a_layer_whose_error_is_no_number_is_the_worst() -> None:
    broken = replace(UP, name="broken", error=math.nan)
    for layers in ([broken, QUERY, UP], [QUERY, UP, broken]):
        worst = PruneReport("x", layers).totals.worst
        assert worst is not None and worst.name == "broken"


@pytest.mark.parametrize(
    ("asked", "reached", "missed"),
    [
        (0.5, 0.5, False),
        (0.5, 0.51, False),
        (0.5, 0.49, False),
        (0.5, 0.511, True),
        (0.5, 0.48, True),
        (0.5, math.nan, True),
    ],
)
def test_one_point_is_the_limit(asked: float, reached: float, missed: bool) -> None:
    assert replace(UP, asked=asked, reached=reached).missed is missed


def test_check_finds_nothing_in_a_good_report() -> None:
    assert sample().check() == []
    assert PruneReport("no heat", [replace(UP, heat=())]).check() == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"asked": 1.5}, "asked is 1.5, no share"),
        ({"reached": math.nan}, "reached is nan"),
        ({"error": math.inf}, "error is inf"),
        ({"error": -0.1}, "error is -0.1"),
        ({"seconds": -1.0}, "seconds is -1.0"),
        ({"dense_us": math.nan}, "dense_us is nan"),
        ({"sparse_us": -1.0}, "sparse_us is -1.0"),
        ({"stored_bytes": -1}, "stored_bytes is -1"),
        ({"shape": (0, 4)}, "shape is [0, 4]"),
        ({"heat": ((0.5,), (0.5, 0.5))}, "heat"),
        ({"heat": ((),)}, "heat"),
        ({"heat": ((1.5,),)}, "heat"),
        ({"heat": ((0.5,),) * 33}, "heat"),
        ({"heat": ((0.5,) * 33,)}, "heat"),
    ],
)
def test_check_names_each_violation(change: dict[str, float], complaint: str) -> None:
    bad = replace(UP, **change)  # type: ignore[arg-type]  # each of its field's type
    (found,) = PruneReport("bad", [QUERY, bad]).check()
    assert found.startswith(f"{UP.name}: ")
    assert complaint in found


@pytest.mark.parametrize("columns", ["20", "100", "115", "116", "143", "144", "160", "500"])
def test_text_fits_and_has_every_layer(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    text = str(long())
    width = min(max(int(columns), report_text.NARROWEST), report_text.WIDEST)
    assert max(len(line) for line in text.splitlines()) <= width
    solid = "".join(text.split())  # names may be folded over two lines
    assert all(f"model.layers.{at}.mlp." in solid for at in range(30))
    assert text.count("2.00x") == 210 + 1, "each layer and the total"
    assert text.count("2:4") == 210
    assert text.count("SparseGPT") == 210, "in a column of its own or under the pattern"
    assert all(f" {0.1 + n / 1e3:.3g} " in text for n in range(210)), "no number is cut"
    assert ("1536x576" in text) == (width >= report_text.ROOMY)


def test_text_has_totals_facts_and_what_stands_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    text = str(sample())
    for part in (
        "Llama",
        "  target: cuda sm_90",
        "largest output error: 0.4 in model.layers.0.self_attn.q_proj, 1.60x the mean",
        "missed by more than one point in 1 layer: model.layers.0.self_attn.q_proj (55% of 60%)",
        "3 layers pruned: 1.24 M of 2.1 M weights are zero (59.2%, 60% asked), decided in 6 s",
        "mean output error: 0.25",
        "their bytes: 12 kB dense -> 6.75 kB now (56%)",
        "400 us dense -> 350 us sparse (1.14x); 1 without a prediction",
    ):
        assert part in text
    (row,) = (line for line in text.splitlines() if line.startswith("head"))
    assert row.split() == ["head", "1536x576", "2:4", "SparseGPT", "70%", "70%", "2", "56%"]


def test_text_leaves_out_columns_that_say_nothing() -> None:
    text = str(PruneReport("data-free", [HEAD]))
    (head,) = (line for line in text.splitlines() if line.startswith("layer"))
    assert not {"error", "dense", "sparse", "gain"} & set(head.split())
    assert "output error" not in text and "predicted time" not in text


def test_text_names_the_farthest_of_many_missed_layers() -> None:
    layers = [replace(UP, name=f"layer{n}", reached=0.5 - n / 100) for n in range(2, 10)]
    lines = str(PruneReport("x", layers)).splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("sparsity missed"))
    said = " ".join(line.strip() for line in lines[at : at + 2])
    assert "in 8 layers: layer9 (41% of 50%); layer8" in said
    assert "; 3 more" in said


def test_text_cannot_drive_the_terminal() -> None:
    hostile = replace(UP, name=HOSTILE, pattern=HOSTILE, criterion=HOSTILE, reached=0.1)
    text = str(PruneReport(HOSTILE, [hostile, QUERY], {"a": HOSTILE}))
    assert "\x1b" not in text and "\u202e" not in text
    assert "[red]" in text, "rich markup is not read"


def test_text_of_an_empty_report() -> None:
    assert "0 layers pruned" in str(PruneReport("empty"))


shares = st.floats(0, 1)
numbers = st.none() | st.floats(0, 1e300)
names = st.text(max_size=20)
grids = st.integers(0, CELLS).flatmap(
    lambda rows: st.integers(1, CELLS).flatmap(
        lambda width: st.tuples(*[st.tuples(*[shares] * min(width, 4))] * min(rows, 4))
    )
)
pruned_layers = st.builds(
    PrunedLayer,
    name=names,
    block=names,
    shape=st.tuples(st.integers(1, 2**31 - 1), st.integers(1, 2**31 - 1)),
    pattern=names,
    criterion=names,
    asked=shares,
    reached=shares,
    error=numbers,
    seconds=st.floats(0, 1e300),
    dense_bytes=st.integers(0, 2**53 - 1),
    stored_bytes=st.integers(0, 2**53 - 1),
    dense_us=numbers,
    sparse_us=numbers,
    heat=grids,
)


@settings(deadline=None)
@given(st.lists(pruned_layers, max_size=3), names, st.dictionaries(names, names, max_size=2))
def test_any_report_reads_back_equal_and_can_be_shown(
    tmp_path_factory: pytest.TempPathFactory,
    layers: list[PrunedLayer],
    title: str,
    facts: dict[str, str],
) -> None:
    folder = tmp_path_factory.getbasetemp()
    report = PruneReport(title, layers, facts)
    report.to_json(folder / "report.json")
    assert PruneReport.from_json(folder / "report.json") == report
    assert str(report)
    page = Page(html(report, folder))
    assert page.open == []
    assert page.tags.count("tr") == len(layers) + (1 if layers else 0)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.sampled_from(sorted(asdict(UP))), anything)
def test_any_value_of_a_field_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, field: str, value: object
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.json"
    data = {"version": 1, "title": "t", "facts": {}, "layers": [asdict(UP) | {field: value}]}
    path.write_text(json.dumps(data))
    try:
        report = PruneReport.from_json(path)
    except InvalidReport as error:
        said = str(error)
    else:
        assert report.check() == []
        said = str(report) + field
    assert field in said


def _edit(part: str, value: object) -> bytes:
    """The JSON of a report in which a part of the whole, or a field of its layer, is `value`."""
    data: dict[str, object] = {"version": 1, "title": "t", "facts": {}, "layers": [asdict(UP)]}
    change = {part: value} if part in data else {"layers": [asdict(UP) | {part: value}]}
    return json.dumps(data | change).encode()


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "version 1"),
        (_edit("version", 2), "version 1"),
        (_edit("title", None), "title"),
        (_edit("facts", {"target": 3}), "fact"),
        (_edit("layers", [{"name": "x"}]), "fields"),
        (_edit("layers", [3]), "fields"),
        (_edit("another", 1), "fields"),
        (_edit("shape", [576, True]), "shape"),
        (_edit("heat", [[0.5], ["x"]]), "heat"),
        (_edit("dense_bytes", 10**400), "dense_bytes of a layer is 1000"),
        (_edit("asked", 50), "asked is 50, no share"),
    ],
)
def test_a_damaged_report_is_one_typed_error(tmp_path: Path, content: bytes, rule: str) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(InvalidReport, match=rule) as caught:
        PruneReport.from_json(path)
    assert "report.json" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_the_reports_do_not_read_each_other(tmp_path: Path) -> None:
    sample().to_json(tmp_path / "pruned.json")
    Report("compiled").to_json(tmp_path / "compiled.json")
    with pytest.raises(InvalidReport, match="rows are missing|not a report"):
        Report.from_json(tmp_path / "pruned.json")
    with pytest.raises(InvalidReport, match="layers are missing|not a report"):
        PruneReport.from_json(tmp_path / "compiled.json")


def test_nan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        PruneReport("bad", [replace(UP, error=math.nan)]).to_json(tmp_path / "report.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("microseconds", "said"),
    [(0.5, "0.5 us"), (1500, "1.5 ms"), (9e7, "90 s"), (1.5e8, "2.5 min"), (1.08e10, "3 h")],
)
def test_durations_are_said_in_a_unit_that_fits(microseconds: float, said: str) -> None:
    assert words.duration(microseconds) == said
