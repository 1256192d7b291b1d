"""The shell commands, on tiny models made here; bad input is one line on stderr, no traceback."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import sparsefx
from sparsefx.cli import main
from sparsefx.model_files import load_model
from sparsefx.spec import NM

RECIPE = """
[[weights]]
match = "*.mlp.*"
pattern = "nm"
n = 2
m = 4
"""
LINEARS = 4 + 3 + 1  # attention, MLP, output head


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(llama: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    llama.save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """One 2:4 matrix, one dense one, a lookup table, a bias."""
    torch.manual_seed(0)
    weight = torch.randn(32, 64)
    path = tmp_path / "bare.safetensors"
    tensors = {
        "layers.0.mlp.up.weight": weight * NM(2, 4).keep(weight.abs()),
        "layers.0.mlp.down.weight": torch.randn(64, 32),
        "layers.0.mlp.down.bias": torch.randn(64),
        "embed_tokens.weight": torch.randn(16, 64),
    }
    save_file(tensors, path)
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)
    return path


def run(*argv: object) -> int:
    return main([str(word) for word in argv])


@pytest.mark.parametrize("command", [[], ["explain"], ["sparsify"], ["export"], ["bench"]])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert "safetensors" in text
    assert "recipe.toml" in text if not command else "MODEL" in text


def test_explain_lists_the_patterns_of_a_bare_file(
    bare: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("explain", bare, "--json", tmp_path / "report.json") == 0
    assert "2:4" in capsys.readouterr().out
    rows = {row["name"]: row for row in json.loads((tmp_path / "report.json").read_text())["rows"]}
    assert len(rows) == 3
    assert rows["layers.0.mlp.up.weight"]["pattern"] == "2:4"
    assert rows["layers.0.mlp.down.weight"]["pattern"] == "dense"
    assert all(row["reason"] for row in rows.values())


def test_explain_has_a_row_for_every_linear_of_a_folder(
    folder: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "report.json", tmp_path / "report.html"
    options = ("--guard", "off", "--target", "cpu", "--rows", 8, "--recipe", recipe)
    assert run("explain", folder, *options, "--json", out, "--html", page) == 0
    assert "mlp.up_proj" in capsys.readouterr().out
    assert "mlp.up_proj" in page.read_text()
    rows = [row for row in json.loads(out.read_text())["rows"] if row["op"] == "linear"]
    assert len(rows) == LINEARS
    assert sum(row["pattern"] == "2:4" for row in rows) == 3
    assert all(row["kernel"] or row["reason"] for row in rows)


def test_sparsify_a_folder_gives_a_folder_that_loads(
    llama: LlamaForCausalLM, folder: Path, recipe: Path, tmp_path: Path
) -> None:
    out = tmp_path / "pruned"
    assert run("sparsify", folder, recipe, out) == 0
    expected = sparsefx.sparsify(llama, sparsefx.Recipe.from_toml(recipe)).state_dict()
    loaded = load_model(out)
    assert type(loaded) is LlamaForCausalLM
    assert (out / "tokenizer.json").read_text() == "{}"
    torch.testing.assert_close(dict(loaded.state_dict()), dict(expected), rtol=0, atol=0)
    assert run("explain", out / "model.safetensors", "--json", tmp_path / "report.json") == 0
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert sum(row["pattern"] == "2:4" for row in rows) == 3


def test_sparsify_a_bare_file(bare: Path, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "pruned"
    assert run("sparsify", bare, recipe, out) == 0
    before, after = (
        load_model(bare).state_dict(),
        load_model(out / "model.safetensors").state_dict(),
    )
    down = "layers.0.mlp.down.weight"
    assert before.keys() == after.keys()
    assert torch.equal(after[down], before[down] * NM(2, 4).keep(before[down].abs()))
    for name in before.keys() - {down}:
        assert torch.equal(after[name], before[name]), name


def test_a_glob_does_not_prune_a_lookup_table(bare: Path, tmp_path: Path) -> None:
    everything = tmp_path / "everything.toml"
    everything.write_text(RECIPE.replace("*.mlp.*", "*"))
    assert run("sparsify", bare, everything, tmp_path / "out") == 0
    pruned = load_model(tmp_path / "out" / "model.safetensors").state_dict()
    assert (pruned["embed_tokens.weight"] != 0).all()


@pytest.mark.parametrize("dynamic", [[], ["--dynamic"]])
def test_export_runs_in_onnxruntime(
    folder: Path, recipe: Path, tmp_path: Path, dynamic: list[str]
) -> None:
    out = tmp_path / "model.onnx"
    assert run("export", folder, out, "--recipe", recipe, "--rows", 8, *dynamic) == 0
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    (ids,) = session.get_inputs()
    batch, length = (3, 5) if dynamic else (1, 8)
    logits = session.run(None, {ids.name: torch.randint(64, (batch, length)).numpy()})[0]
    assert logits.shape == (batch, length, 64)


def test_export_with_a_library(
    folder: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, library = tmp_path / "model.onnx", tmp_path / "kernels.so"
    command = ("export", folder, out, "--recipe", recipe, "--rows", 8, "--ort-library", library)
    assert run(*command) == 0
    assert f"wrote {library}" in capsys.readouterr().out
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(out, options, providers=["CPUExecutionProvider"])
    (ids,) = session.get_inputs()
    assert session.run(None, {ids.name: np.ones((1, 8), "int64")})[0].shape == (1, 8, 64)


@pytest.mark.parametrize("source", ["folder", "bare"])
def test_bench_compares_with_torch_compile(
    source: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    model = request.getfixturevalue(source)
    options = ("--runs", 2, "--rows", 8, "--guard", "off", "--target", "cpu")
    assert run("bench", model, *options) == 0
    text = capsys.readouterr().out
    assert "torch.compile" in text
    assert "quartiles" in text


def test_input_replaces_the_made_up_sample(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = tmp_path / "arguments.safetensors"
    save_file({"input_ids": torch.randint(64, (1, 13))}, arguments)
    assert run("explain", folder, "--guard", "off", "--target", "cpu", "--input", arguments) == 0
    assert "@ 13" in capsys.readouterr().out


def test_explain_plans_for_a_gpu_that_is_absent(
    folder: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = ["--target", "h100", "--guard", "model"]
    assert run("explain", folder, *plan, "--recipe", recipe, "--rows", 8) == 0
    assert "triton_nm_linear" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["explain"], ["export", "m.onnx"]], ids=lambda argv: argv[0])
def test_input_that_the_model_does_not_take(
    command: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = tmp_path / "arguments.safetensors"
    save_file({"no_such_argument": torch.zeros(1, 13)}, arguments)
    name, *out = command
    assert run(name, folder, *(tmp_path / path for path in out), "--input", arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"sparsefx {name}: {arguments} cannot be read as the model's inputs")
    assert list(tmp_path.iterdir()) == [arguments]


class Bad:
    """Arguments that must be refused; each takes the test's folder, makes its files there."""

    @staticmethod
    def missing(path: Path) -> list[object]:
        return ["explain", path / "nowhere"]

    @staticmethod
    def empty_folder(path: Path) -> list[object]:
        (path / "empty").mkdir()
        return ["explain", path / "empty"]

    @staticmethod
    def config_is_not_json(path: Path) -> list[object]:
        (path / "config.json").write_text("]")
        return ["explain", path]

    @staticmethod
    def config_alone(path: Path) -> list[object]:
        LlamaConfig().save_pretrained(path)
        return ["explain", path]

    @staticmethod
    def pickled(path: Path) -> list[object]:
        (path / "weights.bin").write_bytes(b"\x80\x04K\x00.")
        return ["explain", path / "weights.bin"]

    @staticmethod
    def truncated(path: Path) -> list[object]:
        file = path / "cut.safetensors"
        save_file({"a.weight": torch.zeros(8, 8)}, file)
        file.write_bytes(file.read_bytes()[:-9])
        return ["bench", file]

    @staticmethod
    def names_that_collide(path: Path) -> list[object]:
        save_file({"a": torch.zeros(8), "a.weight": torch.zeros(8, 8)}, path / "x.safetensors")
        return ["bench", path / "x.safetensors"]

    @staticmethod
    def oversized_layout(path: Path) -> list[object]:
        entry = {"kind": "dense", "shape": [2**40], "dtype": "float32"}
        layout = {"version": 1, "masks_only": False, "tensors": {"w": entry}, "aliases": {}}
        file = path / "model.safetensors"
        save_file({"w": torch.zeros(1)}, file, metadata={"sparsefx": json.dumps(layout)})
        return ["explain", file]

    @staticmethod
    def export_of_a_bare_file(path: Path) -> list[object]:
        save_file({"a.weight": torch.zeros(8, 8)}, path / "x.safetensors")
        return ["export", path / "x.safetensors", path / "x.onnx"]

    @staticmethod
    def recipe_is_not_toml(path: Path) -> list[object]:
        save_file({"a.weight": torch.zeros(8, 8)}, path / "x.safetensors")
        (path / "recipe.toml").write_text("= 1")
        return ["sparsify", path / "x.safetensors", path / "recipe.toml", path / "out"]

    @staticmethod
    def recipe_matches_nothing(path: Path) -> list[object]:
        save_file({"a.weight": torch.zeros(8, 8)}, path / "x.safetensors")
        (path / "recipe.toml").write_text(RECIPE)
        return ["sparsify", path / "x.safetensors", path / "recipe.toml", path / "out"]

    @staticmethod
    def out_exists(path: Path) -> list[object]:
        (path / "recipe.toml").write_text(RECIPE)
        return ["sparsify", path / "x.safetensors", path / "recipe.toml", path]


CASES = [name for name in vars(Bad) if not name.startswith("_")]


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = getattr(Bad, case)(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert run(*argv) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"sparsefx {argv[0]}: ")
    assert said.count("\n") == 1
    assert str(tmp_path) in said or case == "recipe_matches_nothing"
    assert sorted(tmp_path.rglob("*")) == before, "something was left behind"


def test_usage_errors_leave_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", "model", "--runs", "0"])
    assert end.value.code == 2
    assert "at least 2" in capsys.readouterr().err


def test_a_folder_without_transformers_names_the_remedy(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert run("explain", folder) == 2
    assert "pip install 'sparsefx[huggingface]'" in capsys.readouterr().err
