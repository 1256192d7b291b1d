"""sensitivity(): errors, metrics and knees of each layer alone, and their report."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsefx
from sparsefx.api.sensitivity import CHOICES
from sparsefx.errors import (
    EmptyCalibration,
    InvalidReport,
    MissingCalibration,
    NonFiniteMetric,
    UnknownOption,
)
from sparsefx.prune.sensitivity.knee import bearable, knee
from sparsefx.prune.sensitivity.layers import Scan, Trial
from sparsefx.prune.sensitivity.records import SensitivityReport
from tests.residual_net import NAMES, WANDA, Distance, Net, X, by_wanda, error_of, inputs
from tests.test_report import HOSTILE, Page

HALF = replace(WANDA, sparsity=0.5)


def scanned(model: nn.Module, *args: object, **options: object) -> SensitivityReport:
    recipe = sparsefx.Recipe({"*": HALF})
    return sparsefx.sensitivity(model, recipe, [X[:60], X[60:]], *args, progress=False, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(0, 0), (0.3, 0.03), (0.5, 0.05), (0.6, 0.06), (0.7, 0.5), (0.8, 0.94)], 0.6),
        ([(0, 0), (0.2, 0.2), (0.4, 0.4), (0.8, 0.8)], 0.8),  # a line bends nowhere
        ([(0, 0), (0.2, 0.5), (0.4, 0.8), (0.6, 0.9)], 0.6),  # nor up, where it flattens
        # Levels far apart do not make a bend: x^2 has the same everywhere, the kink counts.
        ([(s, s * s + 0.3 * max(0.0, s - 0.7)) for s in (0, 0.4, 0.6, 0.7, 0.8, 0.9)], 0.7),
        ([(0, 17.0), (0.3, 17.1), (0.5, 18.0), (0.6, math.inf), (0.7, 19.0)], 0.5),
        ([(0, 0), (0.3, math.inf)], 0.0),
        ([(0, 1.0)], 0),
    ],
)
def test_knees_of_made_up_curves(points: list[tuple[float, float]], expected: float) -> None:
    assert knee(points) == expected


def test_bearable_is_the_level_before_the_first_that_is_worse() -> None:
    points = [(0, 10.0), (0.3, 9.0), (0.5, 10.1), (0.6, 10.2), (0.7, 10.0)]
    assert bearable(points) == 0.5
    assert bearable(points, drop=0.05) == 0.7
    assert bearable([(0, -10.0), (0.3, -9.95), (0.5, -9.8)]) == 0.3  # as 1 - accuracy - 11 might be
    assert bearable([(0, 10.0), (0.3, math.inf)]) == bearable([(0, 1.0), (0.3, math.nan)]) == 0


def test_errors_are_those_of_each_layer_alone_on_dense_inputs() -> None:
    model = Net()
    report = scanned(model)
    assert [scan.name for scan in report.layers] == NAMES and report.check() == []
    for scan in report.layers:
        weight, x = model.get_parameter(scan.name).detach(), inputs(model, scan.name)
        for trial, choice in zip(scan.trials, CHOICES, strict=True):
            assert (trial.pattern, trial.sparsity) == (str(choice), choice.sparsity)
            if isinstance(choice, sparsefx.Unstructured):
                expected = error_of(weight, by_wanda(weight, x, choice.sparsity), x)
                assert trial.error == pytest.approx(expected, rel=1e-4)
        assert scan.error_knee == knee(scan.errors()) and scan.bears is None
        assert [x for x, _ in scan.errors()] == [0, 0.3, 0.5, 0.6, 0.7, 0.8]
    for number in range(5):
        errors = [scan.trials[number].error or 0.0 for scan in report.layers]
        assert report.whole.trials[number].error == pytest.approx(sum(errors) / 6)


def test_what_does_not_fit_is_left_out_with_the_reason() -> None:
    recipe = sparsefx.Recipe({"head.weight": replace(HALF, criterion=sparsefx.DSnoT())})
    choices = (sparsefx.NM(2, 4), sparsefx.Rows(0.5), sparsefx.Unstructured(0.5))
    report = sparsefx.sensitivity(Net(), recipe, [X], choices=choices, progress=False)
    (scan,) = report.layers
    assert [trial.reason == "" for trial in scan.trials] == [False, False, True]
    assert "not a multiple of m=4" in scan.trials[0].reason and "DSnoT" in scan.trials[1].reason
    assert scan.curve == [] and scan.error_knee is None  # one level is no curve
    assert report.whole.trials[0].reason == "it fits no layer"
    assert "2:4 left out of head: 10 input features" in str(report)


@pytest.mark.parametrize("by", ["weight", "block"])
def test_the_metric_is_that_of_the_model_with_one_thing_pruned(by: str) -> None:
    model = Net().train()
    before = copy.deepcopy(model.state_dict())
    metric = Distance(model)
    choices = (sparsefx.Unstructured(0.3), sparsefx.Unstructured(0.6), sparsefx.NM(2, 4))
    report = scanned(model, metric, choices=choices, by=by)
    # Dense; each weight, or two blocks and two weights outside of them; all layers at once. 2:4
    # does not fit the head, which is then not asked about.
    assert metric.calls == 1 + (3 * 6 if by == "weight" else 3 * 4) - 1 + 3
    assert metric.training == {False} and model.training
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    for scan in report.layers:
        together = NAMES[:2] if by == "block" and scan.name in NAMES[:2] else [scan.name]
        together = NAMES[2:4] if by == "block" and scan.name in NAMES[2:4] else together
        for trial in scan.trials[:2]:
            changed = copy.deepcopy(model)
            for name in together:
                weight, x = model.get_parameter(name).detach(), inputs(model, name)
                changed.get_parameter(name).data = by_wanda(weight, x, trial.sparsity)
            with torch.no_grad():
                assert trial.metric == pytest.approx(Distance(model)(changed), rel=1e-5)
    assert scan.trials[2].metric is None and scan.rise_of(scan.trials[2]) is None
    fast = sparsefx.sparsify(
        model, sparsefx.Recipe({"*": replace(HALF, sparsity=0.6)}), [X[:60], X[60:]], progress=False
    )
    with torch.no_grad():
        assert report.whole.trials[1].metric == pytest.approx(Distance(model)(fast.eval()))
    assert report.whole.bears == 0.0  # its first level costs more than 1 %


def test_a_metric_that_fails_leaves_the_model_as_it_was() -> None:
    model = Net()
    model.blocks[0]["up"].weight.data[0, 0] = -0.0  # bit for bit, signs of zeros too
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        scanned(model, Distance(model, fails=9), by="block")
    for name, now in model.state_dict().items():
        assert torch.equal(before[name].view(torch.int32), now.view(torch.int32))


def test_a_metric_without_numbers_counts_as_lost() -> None:
    model, calls = Net(), 0

    def metric(_: nn.Module) -> float:
        nonlocal calls
        calls += 1
        return math.nan if calls > 1 else 2.0

    recipe = sparsefx.Recipe({"head.weight": HALF})
    choices = (sparsefx.Unstructured(0.5), sparsefx.Unstructured(0.6))
    report = sparsefx.sensitivity(model, recipe, [X], metric, choices=choices, progress=False)
    (scan,) = report.layers
    assert [trial.metric for trial in scan.trials] == [None, None] and report.check() == []
    assert (scan.bears, scan.metric_knee, scan.rise_of(scan.trials[0])) == (0, 0, math.inf)
    assert "+inf%" in str(report)
    with pytest.raises(NonFiniteMetric, match="dense Net is inf"):
        sparsefx.sensitivity(model, recipe, [X], metric, progress=False)


def test_bad_arguments() -> None:
    model, recipe = Net(), sparsefx.Recipe({"*": HALF})
    with pytest.raises(MissingCalibration, match="sensitivity"):
        sparsefx.sensitivity(model, recipe, None)  # type: ignore[arg-type]
    with pytest.raises(EmptyCalibration):
        sparsefx.sensitivity(model, recipe, [])
    for options in ({"choices": ()}, {"choices": "2:4"}, {"choices": (None,)}, {"by": "model"}):
        with pytest.raises(UnknownOption):
            scanned(model, **options)
    with pytest.raises(UnknownOption):
        sparsefx.sensitivity(model, {"*": HALF}, [X])  # type: ignore[arg-type]


def made_up(name: str, errors: tuple[float, ...], metrics: tuple[float | None, ...]) -> Scan:
    levels = (0.5, 0.6, 0.7)
    trials = [
        Trial(f"unstructured {s:.0%}", "unstructured", s, error, metric, "")
        for s, error, metric in zip(levels, errors, metrics, strict=True)
    ]
    unfit = Trial("2:4", "n:4", 0.5, None, None, "it is odd")
    return Scan(name, name, 64, "Wanda", 10.0, (*trials, unfit))


def sample() -> SensitivityReport:
    robust = made_up("robust.weight", (0.1, 0.2, 0.4), (10.0, 10.05, 12.0))
    fragile = made_up(HOSTILE, (0.3, 0.35, 0.6), (10.2, 13.0, None))
    whole = made_up("", (0.2, 0.275, 0.5), (10.01, 14.0, None))
    return SensitivityReport("Net", whole, [robust, fragile], {"choices": "3"})


def test_the_report_survives_json_and_refuses_what_cannot_be(tmp_path: Path) -> None:
    report, path = sample(), tmp_path / "report.json"
    report.to_json(path)
    assert SensitivityReport.from_json(path) == report
    text = path.read_text()
    for old, new in (
        ('"error": 0.1,', '"error": -0.1,'),
        ('"sparsity": 0.7', '"sparsity": 1.5'),
        ('"trials": [', '"trials": [3, '),
        ('"name": ""', '"name": "first"'),
        ('"kind": "n:4"', '"kind": 4'),
    ):
        assert old in text
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(InvalidReport):
            SensitivityReport.from_json(path)


def test_text_has_the_most_fragile_first_and_knees() -> None:
    report = sample()
    lines = str(report).splitlines()
    rows = [line for line in lines if line.lstrip().startswith(("all layers ", "layer.", "robust"))]
    assert rows[0].split()[2:] == ["0.2", "0.275", "0.5", "-", "60%", "50%"]
    assert rows[1].startswith("layer.<script>") and rows[2].startswith("robust")
    robust = report.layers[0]
    assert (robust.error_knee, robust.bears, robust.metric_knee) == (0.6, 0.6, 0.6)
    assert "all layers together bear 50%" in str(report)
    assert report.most_fragile[0].name == HOSTILE
    assert "\x1b" not in str(report)


def test_html_has_every_layer_and_is_safe(tmp_path: Path) -> None:
    report = sample()
    report.to_html(tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.open == [] and page.tags.count("script") == 1
    assert page.tags.count("tr") == 1 + 3
    assert page.tags.count("polyline") == 2 * 3, "both charts have a line for each"
    assert "robust" in "".join(page.text) and "+20%" in "".join(page.text)


def test_a_report_on_nothing(tmp_path: Path) -> None:
    report = sparsefx.sensitivity(Net(), sparsefx.Recipe(), [X], progress=False)
    assert report.layers == [] and "no layer was tried" in str(report)
    report.to_html(tmp_path / "report.html")
    report.to_json(tmp_path / "report.json")
    assert SensitivityReport.from_json(tmp_path / "report.json") == report
