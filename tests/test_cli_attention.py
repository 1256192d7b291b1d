"""A recipe with attention from the shell: what commands hand to the API, what they refuse."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparsefx
from sparsefx.attention.spec import SkipSoftmax, Theta
from sparsefx.errors import MissingCalibration, SparseFXError
from tests.test_cli import folder as folder
from tests.test_cli import llama as llama
from tests.test_cli import run

RECIPE = """
[[attention]]
match = "*"
method = "skip_softmax"
scale_factor = [4.0, 2]
tile = [16, 16]
"""
SKIP = SkipSoftmax(scale_factor=(4.0, 2), tile=(16, 16))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.safetensors"
    generator = torch.Generator().manual_seed(0)
    ids = {f"input_ids.{at}": torch.randint(64, (1, 64), generator=generator) for at in range(2)}
    save_file(ids, path)
    return path


class Reached(SparseFXError):
    """Ends a command where it calls the API."""

    message = "reached"


class Spy:
    """Stands for a function of the API: notes what it is called with and ends the command."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.given: dict[str, object] = {}
        monkeypatch.setattr(sparsefx, name, self)

    def __call__(self, *args: object, **kwargs: object) -> None:
        self.given = {**dict(zip(("model", "recipe", "calibration"), args, strict=False)), **kwargs}
        raise Reached()


@pytest.mark.parametrize(
    ("command", "function"),
    [
        ("explain", "compile"),
        ("bench", "compile"),
        ("export", "export_onnx"),
        ("sparsify", "sparsify"),
    ],
)
def test_recipe_and_batches_reach_the_api(
    command: str,
    function: str,
    folder: Path,
    recipe: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spy = Spy(monkeypatch, function)
    out: dict[str, list[object]] = {
        "export": [tmp_path / "model.onnx", "--recipe", recipe],
        "sparsify": [recipe, tmp_path / "out"],
    }
    options = out.get(command, ["--target", "cpu", "--recipe", recipe])
    assert run(command, folder, *options, "--calibration", text) == 2
    assert spy.given["recipe"] == sparsefx.Recipe(attention={"*": SKIP})
    batches, stored = spy.given["calibration"], load_file(text)
    assert isinstance(batches, list)
    assert [set(batch) for batch in batches] == [{"input_ids"}] * 2
    for at, batch in enumerate(batches):
        assert torch.equal(batch["input_ids"], stored[f"input_ids.{at}"])


def test_missing_calibration_names_the_option(
    folder: Path,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        assert kwargs["recipe"] == sparsefx.Recipe(attention=Theta(64))
        raise MissingCalibration(what="Theta")

    recipe.write_text('[attention]\nmethod = "theta"\nk = 64')
    monkeypatch.setattr(sparsefx, "compile", refuse)
    assert run("explain", folder, "--target", "cpu", "--recipe", recipe) == 2
    assert capsys.readouterr().err.endswith("; in the shell: --calibration FILE\n")


class Bad:
    """Arguments that must be refused; each takes the files of the tests."""

    @staticmethod
    def batches_without_a_recipe(folder: Path, recipe: Path, text: Path) -> list[object]:
        return ["explain", folder, "--target", "cpu", "--calibration", text]

    @staticmethod
    def batches_of_another_model(folder: Path, recipe: Path, text: Path) -> list[object]:
        save_file({"no_such_argument.0": torch.zeros(1, 8)}, text)
        return ["bench", folder, "--target", "cpu", "--recipe", recipe, "--calibration", text]

    @staticmethod
    def batches_that_are_none(folder: Path, recipe: Path, text: Path) -> list[object]:
        save_file({"input_ids": torch.zeros(1, 8)}, text)
        return ["sparsify", folder, recipe, text.with_name("out"), "--calibration", text]

    @staticmethod
    def attention_of_a_bare_file(folder: Path, recipe: Path, text: Path) -> list[object]:
        bare = folder / "model.safetensors"
        return ["sparsify", bare, recipe, text.with_name("out"), "--calibration", text]

    @staticmethod
    def misspelt(folder: Path, recipe: Path, text: Path) -> list[object]:
        recipe.write_text(RECIPE.replace("scale_factor", "scale-factor"))
        return ["export", folder, text.with_name("m.onnx"), "--recipe", recipe]


CASES = {
    "batches_without_a_recipe": "Add --recipe TOML",
    "batches_of_another_model": "does not take its tensors as arguments",
    "batches_that_are_none": "input_ids of shape (1, 8) is no stack of batches",
    "attention_of_a_bare_file": "a bare weight file cannot be run",
    "misspelt": "'scale-factor' is not a key of skip_softmax",
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line(
    case: str,
    folder: Path,
    recipe: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = getattr(Bad, case)(folder, recipe, text)
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert run(*argv) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"sparsefx {argv[0]}: ")
    assert CASES[case] in last
    assert sorted(tmp_path.rglob("*")) == before, "something was left behind"
