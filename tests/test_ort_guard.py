"""The library for onnxruntime takes what it makes faster; the rest runs as in a stock runtime."""

from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim

import sparsefx
from sparsefx.codegen.onnx.functions import DENSE_DOMAIN, DOMAIN
from sparsefx.codegen.onnx.ort import guard
from sparsefx.errors import UnknownOption
from sparsefx.guard import Verdict
from sparsefx.report import Report
from tests.onnx_graphs import sparse_mlp
from tests.test_ort_library import agrees, operators_left

FREE = ({0: Dim.AUTO, 1: Dim.AUTO},)
FAST, SLOW = (Verdict(10.0, took, "measured", bound=took / 10) for took in (5.0, 10.0))
Judged = Callable[..., Verdict]


def exported(folder: Path, judge: Judged, monkeypatch: pytest.MonkeyPatch) -> Report:
    monkeypatch.setattr(guard, "_verdict", judge)
    example = (torch.randn(2, 3, 32),)
    return sparsefx.export_onnx(
        sparse_mlp(), example, folder / "m.onnx", dynamic_shapes=FREE, library=folder / "m.so"
    )


def domains(path: Path) -> dict[str, str]:
    nodes = onnx.load(path).graph.node
    return {node.op_type: node.domain for node in nodes if node.domain.startswith(DOMAIN)}


def test_a_node_that_loses_is_left_to_the_stock_runtime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(model: object, node: object, shapes: object, library: Path) -> Verdict:
        return SLOW if node.op_type == "NMLinear" else FAST  # type: ignore[attr-defined]

    report = exported(tmp_path, judge, monkeypatch)
    file, library = tmp_path / "m.onnx", tmp_path / "m.so"
    assert domains(file) == {"NMLinear": DENSE_DOMAIN, "BitmapLinear": DOMAIN}
    left = operators_left(file, library)
    assert "BitmapLinear" in left and not {"NMLinear", "ScatterElements", "BitShift"} & left
    for shape in ((2, 3, 32), (7, 40, 32), (0, 3, 32)):
        agrees(library, file, sparse_mlp(), shape, 1e-5)
    reasons = {row.name: row.reason for row in report.rows if row.pattern}
    assert "not faster here (measured)" in reasons["up"]
    assert "registered runs it sparse" in reasons["middle"]
    assert report.facts["weights that the library leaves alone"].startswith("1:")


def test_all_win_or_all_lose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, verdict, domain in (("fast", FAST, DOMAIN), ("slow", SLOW, DENSE_DOMAIN)):
        folder = tmp_path / name
        report = exported(folder, lambda *_, found=verdict: found, monkeypatch)
        assert set(domains(folder / "m.onnx").values()) == {domain}
        assert ("weights that the library leaves alone" in report.facts) == (verdict is SLOW)
        agrees(folder / "m.so", folder / "m.onnx", sparse_mlp(), (2, 3, 32), 1e-5)
        stock = onnxruntime.InferenceSession(folder / "m.onnx")
        assert stock.get_outputs()


class Twice(nn.Module):
    """One layer at two numbers of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32, bias=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.layer(x), self.layer(y)


def test_a_weight_that_wins_in_one_of_two_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        guard, "_verdict", lambda model, node, shapes, library: FAST if shapes[0][0] == 4 else SLOW
    )
    recipe = sparsefx.Recipe({"*": sparsefx.NM(2, 4)})
    model = sparsefx.sparsify(Twice(), recipe, progress=False).eval()
    inputs, file = (torch.randn(4, 32), torch.randn(64, 32)), tmp_path / "m.onnx"
    report = sparsefx.export_onnx(model, inputs, file, library=tmp_path / "m.so")
    found = [node.domain for node in onnx.load(file).graph.node if node.op_type == "NMLinear"]
    assert sorted(found) == [DOMAIN, DENSE_DOMAIN]
    assert all("in those of its calls where" in row.reason for row in report.rows)


class Wide(nn.Module):
    """Two equal layers, and one so small that no kernel pays."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(1024, 1024)
        self.second = nn.Linear(1024, 1024)
        self.last = nn.Linear(1024, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(self.second(torch.relu(self.first(x))))
        return y


@pytest.mark.slow
def test_every_kind_of_node_is_timed_once_in_a_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 97 % zeros and one row the large layers win on any machine by far."""
    torch.manual_seed(0)
    recipe = sparsefx.Recipe({"*": sparsefx.Unstructured(0.97)})
    model = sparsefx.sparsify(Wide(), recipe, progress=False).eval()
    asked: list[tuple[str, Verdict]] = []
    measure = guard._verdict

    def spy(model: object, node: object, *rest: object) -> Verdict:
        found = measure(model, node, *rest)  # type: ignore[arg-type]
        asked.append((node.inputs[1].name, found))  # type: ignore[attr-defined]
        return found

    monkeypatch.setattr(guard, "_verdict", spy)
    file, library = tmp_path / "w.onnx", tmp_path / "w.so"
    sparsefx.export_onnx(model, (torch.randn(1, 1024),), file, library=library)
    assert all(found.dense_us > 0 and found.sparse_us > 0 for _, found in asked)
    names = [name for name, _ in asked]
    assert len(names) == len(set(names))
    assert next(found for name, found in asked if name.startswith("second")).ratio < 0.8
    agrees(library, file, model, (1, 1024), 1e-5)


def test_bad_guards_are_refused_first(tmp_path: Path) -> None:
    with pytest.raises(UnknownOption, match="measure"):
        sparsefx.export_onnx(sparse_mlp(), (torch.randn(2, 32),), tmp_path / "m", guard="model")
    assert not list(tmp_path.iterdir())
