"""run(): verification of what a pass leaves, the dials of the environment, dumps that run."""

import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from sparsefx.dump import python_code, sample
from sparsefx.dump import write as write_dump
from sparsefx.errors import InvalidGraph, InvalidSetting
from sparsefx.graph import bind, capture, unbind
from sparsefx.passes import pipelines
from sparsefx.passes.detect import Detect
from sparsefx.passes.insert_masks import InsertMasks
from sparsefx.pipeline import STAGES, PassContext, verify
from sparsefx.rewrite import Site
from sparsefx.spec import NM, Recipe
from tests.compilers import JUDGES, eager_compiler
from tests.hf_models import llama
from tests.pass_models import TWO_FOUR, Around, Net, after, assert_same_numbers, sparse, x_of
from tests.plain_target import plain

aten = torch.ops.aten
Spoil = Callable[[fx.GraphModule, fx.Node], object]


@dataclass(frozen=True)
class Spoiler:
    """A pass with a bug."""

    spoil: Spoil
    stage: str = "dense"
    name: str = "spoiler"

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> int:
        (linear,) = (n for n in gm.graph.nodes if n.target is aten.linear.default)
        self.spoil(gm, linear)
        return 1


def forbidden(gm: fx.GraphModule, linear: fx.Node) -> None:
    Site(gm, linear, "spoiler").call(torch.ops.sparsefx.mask.default, *linear.args[1:])


def without_value(gm: fx.GraphModule, linear: fx.Node) -> None:
    del Site(gm, linear, "spoiler").call(aten.relu.default, linear.args[0]).meta["val"]


def absent_attribute(gm: fx.GraphModule, linear: fx.Node) -> None:
    linear.args[1].target = "l.nothing"  # type: ignore[union-attr]


def another_shape(gm: fx.GraphModule, linear: fx.Node) -> None:
    gm.get_submodule("l").weight = nn.Parameter(torch.zeros(2, 2))


def used_before_made(gm: fx.GraphModule, linear: fx.Node) -> None:
    linear.prepend(gm.graph.output_node())


def of_another_graph(gm: fx.GraphModule, linear: fx.Node) -> None:
    linear.args = (fx.Graph().placeholder("x"), *linear.args[1:])


RULES: dict[str, tuple[Spoil, str]] = {
    "an operator of a later stage": (forbidden, "sparsefx.mask.default may not appear"),
    "a node without a value": (without_value, "has no value"),
    "an attribute that is not there": (absent_attribute, "nothing"),
    "an attribute of another shape": (another_shape, r"has shape \(2, 2\), its node \(16, 16\)"),
    "a use before the definition": (used_before_made, "used before it has been defined"),
    "a node of another graph": (of_another_graph, "belong"),
}


def one() -> Around:
    torch.manual_seed(0)
    return Around(lambda s, x: s.l(x), l=sparse(TWO_FOUR))


@pytest.mark.parametrize("rule", RULES)
def test_a_bad_pass_is_named_with_the_rule_that_it_broke(rule: str) -> None:
    spoil, words = RULES[rule]
    with pytest.raises(InvalidGraph, match=words) as caught:
        after(one(), (Spoiler(spoil),))
    assert caught.value.fields["after"] == "spoiler"
    assert "SPARSEFX_SKIP=spoiler" in str(caught.value)


@pytest.mark.parametrize("stage", STAGES)
def test_which_operators_a_stage_allows(stage: str) -> None:
    both, own = {"mask", "nm"}, {"nm"}  # a model may bring packed linears of its own
    allowed = {"dense": own, "masked": both, "packed": both, "folded": {"nm"}, "any": both}
    legal = allowed.get(stage, set())
    for kind, last in (("mask", "insert_masks"), ("nm", "pack_nm")):
        passes = pipelines.packing()
        end = [each.name for each in passes].index(last) + 1
        gm, _, _ = after(one(), passes[:end])
        if kind in legal:
            verify(gm, stage, "test")
        else:
            with pytest.raises(InvalidGraph, match="may not appear"):
                verify(gm, stage, "test")


def test_branches_of_control_flow_are_graphs_not_tensors() -> None:
    def forward(s: Around, x: Tensor) -> Tensor:
        return s.l(torch.cond(x.sum() > 0, lambda v: v * 2, lambda v: v - 1, (x,)))

    model = Around(forward, l=sparse(TWO_FOUR))
    gm, _, counts = after(model, pipelines.packing())
    assert counts["pack_nm"] == 1
    for sign in (1, -1):
        assert_same_numbers(gm, model, x_of().abs() * sign)


def test_counts_and_times_of_every_pass() -> None:
    passes = pipelines.inference(plain(), JUDGES)
    _, ctx, counts = after(Net(), passes)
    assert list(counts) == list(ctx.seconds) == [each.name for each in passes]
    assert all(0 < seconds < 60 for seconds in ctx.seconds.values())


def test_what_no_node_reads_is_dropped() -> None:
    gm, _, _ = after(one(), pipelines.packing())
    names = [name for name, _ in (*gm.named_parameters(), *gm.named_buffers())]
    assert sorted(names) == ["l.bias", "l.weight_index", "l.weight_values"]


# SPARSEFX_SKIP


@pytest.mark.parametrize("name", ["detect", "insert_masks", "pack_nm", "fuse_epilogue"])
def test_a_pass_can_be_left_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEFX_SKIP", f" {name} ,another")
    model = Net()
    gm, ctx, counts = after(model, pipelines.packing())
    assert name not in counts
    assert name not in ctx.seconds
    assert len(counts) == 6
    assert_same_numbers(gm, model)


def test_without_packing_masks_are_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEFX_SKIP", "pack_nm,pack_block,pack_bitmap")
    gm, _, counts = after(Net(), pipelines.packing())
    assert counts == {"detect": 2, "insert_masks": 2, "fold_masks": 2, "fuse_epilogue": 0}
    assert_same_numbers(gm, Net())


@pytest.mark.parametrize("value", ["pass", "passes,onxx", "all,passes", "1"])
def test_an_illegal_dump_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEFX_DUMP", value)
    with pytest.raises(InvalidSetting, match="legal values: passes, .*all"):
        after(one(), (Detect(),))


# SPARSEFX_DUMP=passes


END = "---"
RUN_EACH = f"""
import runpy, sys
for file in sys.argv[1:]:
    runpy.run_path(file, run_name="__main__")
    print({END!r})
"""


def printed(*files: Path) -> list[str]:
    """What each dumped file prints when it is run, all in one process that knows no test."""
    command = [sys.executable, "-c", RUN_EACH, *map(str, files)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.split(f"{END}\n")[:-1]


@pytest.fixture
def dumps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("SPARSEFX_DUMP", "passes")
    monkeypatch.setenv("SPARSEFX_DUMP_FOLDER", str(tmp_path))
    return tmp_path / "graph0"


NAMES = [
    "00_captured",
    "01_detect",
    "02_insert_masks",
    "03_pack_nm",
    "04_pack_block",
    "05_pack_bitmap",
    "06_fold_masks",
    "07_fuse_epilogue",
]


def test_every_stage_of_the_export_door_runs_by_itself(dumps: Path) -> None:
    model = Net()
    gm, _, _ = after(model, pipelines.packing())
    files = sorted(dumps.glob("*.py"))
    assert [file.stem for file in files] == NAMES
    (x,) = sample({"x": ((3, 16), "float64")})
    with torch.no_grad():
        expected = f"({model(x)},)\n"
    assert printed(*files) == [expected] * len(files)
    alone = subprocess.run([sys.executable, files[-1]], capture_output=True, text=True, check=True)
    assert alone.stdout == expected
    assert python_code(gm).src.strip().splitlines()[-1].strip() in files[-1].read_text()


@torch.no_grad()
def test_every_stage_of_a_language_model_from_dynamo_runs_by_itself(dumps: Path) -> None:
    """Sizes are symbols, inputs whole numbers; the last stage calls a kernel of the cache."""
    torch.manual_seed(0)
    case = llama()
    recipe = Recipe({"*mlp*": NM(2, 4)})
    case.model.load_state_dict(pruned(case.model, recipe))
    torch._dynamo.reset()
    compiler = eager_compiler("llama")
    torch.compile(case.model, backend=compiler, dynamic=True)(**case.kwargs)
    files = sorted(dumps.glob("*.py"))
    fused = ["08_fuse_gated_mlp", "09_merge_projections"]
    lowered = ["10_lower_attention", "11_lower_conv", "12_lower"]
    assert [file.stem for file in files] == [*NAMES, *fused, *lowered]
    assert "SymInt" in files[0].read_text()
    first, *later = [numbers(text) for text in printed(*files)]
    assert first.numel() > 0
    for result in later:
        torch.testing.assert_close(result, first, rtol=1e-3, atol=1e-3)


def pruned(model: nn.Module, recipe: Recipe) -> dict[str, Tensor]:
    state = dict(model.state_dict())
    for name, value in state.items():
        pattern = recipe.pattern_for(name)
        state[name] = value if pattern is None else value * pattern.keep(value.abs())
    return state


def numbers(text: str) -> Tensor:
    """The numbers in a printed tensor."""
    words = text.replace("[", " ").replace("]", " ").replace(",", " ").split()
    found = [word for word in words if word.replace("e-", "").replace(".", "").strip("-").isdigit()]
    return torch.tensor([float(word) for word in found])


def test_branches_are_dumped_as_classes(dumps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def forward(s: Around, x: Tensor) -> Tensor:
        return s.l(torch.cond(x.sum() > 0, lambda v: s.l(v), lambda v: v * 2, (x,)))

    model = Around(forward, l=sparse(TWO_FOUR))
    after(model, pipelines.packing())
    (x,) = sample({"args_0": ((3, 16), "float64")})
    with torch.no_grad():
        runpy.run_path(str(sorted(dumps.glob("*.py"))[-1]), run_name="__main__")
        assert capsys.readouterr().out == f"({model(x)},)\n"


def test_large_weights_are_described_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sparsefx.dump.WEIGHTS_LIMIT", 1000)
    gm = capture(one(), (x_of(),))
    path = write_dump(gm, tmp_path, 3, 1, "detect", "dense")
    assert path == tmp_path / "graph3" / "01_detect.py"
    assert [file.name for file in path.parent.iterdir()] == ["01_detect.py"]
    assert "random, too large to dump" in path.read_text()
    texts = []
    for _ in range(2):
        runpy.run_path(str(path), run_name="__main__")
        texts.append(capsys.readouterr().out)
    assert texts[0].startswith("(tensor(")
    assert texts[0] == texts[1]


def test_nothing_is_dumped_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSEFX_DUMP", raising=False)
    monkeypatch.setenv("SPARSEFX_DUMP_FOLDER", str(tmp_path))
    after(one(), (Detect(), InsertMasks()))
    assert list(tmp_path.iterdir()) == []


# bind and unbind: the Dynamo door


def bound_names(function: Callable[..., object], *args: Tensor) -> tuple[object, list[str]]:
    """What the compiled function returns, and the names of the weights that were bound."""
    names: list[str] = []

    def backend(gm: fx.GraphModule, inputs: list[object]) -> fx.GraphModule:
        bound = bind(gm, inputs)
        names.extend(bound.weights)
        return unbind(bound)

    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(function, backend=backend)(*args), names


def test_two_models_in_one_function_keep_their_own_weights() -> None:
    torch.manual_seed(0)
    first, second = sparse(TWO_FOUR), sparse(TWO_FOUR)
    compiler = eager_compiler("two")

    def both(x: Tensor) -> object:
        return second(torch.tanh(first(x)))

    torch._dynamo.reset()
    with torch.no_grad():
        result = torch.compile(both, backend=compiler)(x_of())
        torch.testing.assert_close(result, both(x_of()))
    assert compiler.session.graphs[0].counts["pack_nm"] == 2
    assert sorted(bound_names(both, x_of())[1]) == ["_2_bias", "_2_weight", "bias", "weight"]


@pytest.mark.parametrize("name", ["graph", "code", "meta", "recompile", "print_readable"])
def test_parts_may_be_called_as_attributes_of_a_graph_module(name: str) -> None:
    model = Around(lambda s, x: getattr(s, name)(x), **{name: sparse(TWO_FOUR)})
    result, names = bound_names(model, x_of())
    with torch.no_grad():
        torch.testing.assert_close(result, model(x_of()))
    assert sorted(names) == [f"_2_{name}.bias", f"_2_{name}.weight"]


def test_dotted_and_underscored_names_are_two_tensors() -> None:
    """a.b_weight and a_b.weight are one name with dots left out."""
    torch.manual_seed(0)
    inner = nn.Module()
    inner.b = sparse(TWO_FOUR)
    model = Around(lambda s, x: s.a_b(s.a.b(x)), a=inner, a_b=sparse(TWO_FOUR))
    compiler = eager_compiler("names")
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=compiler)(x_of()), model(x_of()))
    assert compiler.session.graphs[0].counts["pack_nm"] == 2


def test_weights_that_cannot_be_read_stay_inputs() -> None:
    fake = torch._subclasses.FakeTensorMode()
    gm = fx.Graph()
    node = gm.placeholder("w")
    gm.output(node)
    module = fx.GraphModule(nn.Module(), gm)
    assert bind(module, [fake.from_tensor(torch.ones(2))]).weights == {}
    assert bind(module, [torch.ones(2, device="meta")]).weights == {}
