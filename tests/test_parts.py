"""Weights of several parts, experts and groups of a convolution: each as a weight of its own."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from sparsefx import devices
from sparsefx.calibrate.given import arguments_of, captured
from sparsefx.calibrate.sequential import Observed, run_blocks
from sparsefx.criteria import Criterion
from sparsefx.errors import PatternDoesNotFit, UnobservedLayer
from sparsefx.prune import decide
from sparsefx.prune.allocation.costs import cost
from sparsefx.prune.allocation.layers import Layer
from sparsefx.prune.allocation.proportional import er, erk
from sparsefx.prune.layer_of import layer_of
from sparsefx.prune.loss_gradients import squared_gradients
from sparsefx.prune.measure import Data, error_table
from sparsefx.prune.solve import solve
from sparsefx.prune.weights import prunable_weights
from sparsefx.spec import Pattern
from tests.block_visits import Recorder, assert_sequential, needs_of, nothing, varied
from tests.hf_models import mixtral
from tests.layer_inputs import observed
from tests.moe_models import EXPERTS, MoE, one_by_one, seen_by

STACK = "model.layers.0.mlp.experts"
CRITERIA = [sparsefx.Wanda(), sparsefx.SparseGPT(), sparsefx.DSnoT()]


def mixtral_and_data() -> tuple[nn.Module, list[dict[str, object]]]:
    torch.manual_seed(0)
    model, batch, _, _ = mixtral(4, 16)
    return model, varied(batch, 2)


def moe_and_data(**options: object) -> tuple[MoE, list[dict[str, object]]]:
    torch.manual_seed(0)
    model = MoE(**options).eval()  # type: ignore[arg-type]
    return model, [{"x": torch.randn(2, 20, 16) * torch.rand(16)} for _ in range(2)]


def pruned(
    model: nn.Module, batches: list[dict[str, object]], weights: dict[str, Pattern | None]
) -> nn.Module:
    return sparsefx.sparsify(model, sparsefx.Recipe(weights), batches, progress=False)


def experts_of(model: nn.Module, name: str) -> tuple[Tensor, ...]:
    return prunable_weights(model)[name].matrices()


def assert_as_solved_alone(
    found: Tensor, dense: Tensor, rows: Tensor, samples: int, pattern: Pattern
) -> None:
    """`found` is what `solve` makes of `dense` on rows [n, in] alone, up to rounding."""
    alone = solve(dense, pattern, observed(rows.float(), samples=samples))
    assert ((found != 0) == alone.keep).float().mean() > 0.998
    assert (found - alone.weight).norm() <= 1e-3 * dense.norm()


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("kind", ["2:4", "unstructured"])
def test_an_expert_is_pruned_as_a_linear_that_saw_its_rows(criterion: Criterion, kind: str) -> None:
    model, batches = mixtral_and_data()
    make = {
        "2:4": sparsefx.NM(2, 4, criterion),
        "unstructured": sparsefx.Unstructured(0.6, criterion),
    }
    pattern = make[kind]
    found = pruned(model, batches, {f"{STACK}.*": pattern})
    lines = {line.name: line for line in sparsefx.pruning_report(found).layers}
    assert len(lines) == 2
    for short, rows in seen_by(model, STACK, batches).items():
        name = f"{STACK}.{short}"
        lost = whole = 0.0
        for own, dense, read in zip(
            experts_of(found, name), experts_of(model, name), rows, strict=True
        ):
            assert 10 < len(read) < 2 * 4 * 16
            assert_as_solved_alone(own, dense, read, 2 * 4, pattern)
            lost += float(((dense - own).double() @ read.T).square().sum())
            whole += float((dense.double() @ read.T).square().sum())
        error = lines[name].error
        assert error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
        assert lines[name].shape == (sum(map(len, experts_of(model, name))), rows[0].shape[1])


def test_padding_goes_to_no_expert() -> None:
    model, batches = mixtral_and_data()
    mask = torch.ones(4, 16, dtype=torch.long)
    mask[0, 9:] = mask[2, 12:] = 0
    padded = [{**batch, "attention_mask": mask} for batch in batches]
    seen = Recorder()
    with run_blocks(model, padded, needs_of(model), seen, progress=False) as results:
        assert_sequential(model, padded, seen, dict(results.weights()), mask.bool())
    counts = torch.tensor(seen.counts[f"{STACK}.down_proj"])  # [experts, (rows, samples)]
    assert counts[:, 0].sum() == 2 * 2 * int(mask.sum())
    assert counts[:, 1].tolist() == [2 * 4] * 4


@pytest.mark.parametrize("criterion", [*CRITERIA, sparsefx.Magnitude()])
def test_a_transposed_stack(criterion: Criterion) -> None:
    model, batches = moe_and_data(transposed=True)
    pattern = sparsefx.NM(2, 4, criterion)
    found = pruned(model, batches, {"experts.*": pattern})
    for short, rows in seen_by(model, "experts", batches).items():
        stored = found.get_parameter(f"experts.{short}")
        groups = stored.unflatten(1, (-1, 4))  # inputs come first
        assert ((groups != 0).sum(2) == 2).all()
        dense = model.get_parameter(f"experts.{short}")
        for own, before, read in zip(stored, dense, rows, strict=True):
            assert_as_solved_alone(own.T, before.T, read, 2 * 2, pattern)


def test_half_precision_runs_another_operator() -> None:
    """aten._grouped_mm where float32 has transformers' own."""
    model, batches = moe_and_data()
    model.bfloat16()
    batches = [{"x": batch["x"].bfloat16()} for batch in batches]  # type: ignore[attr-defined]
    seen = Recorder(nothing)
    run_blocks(model, batches, needs_of(model), seen, progress=False).close()
    for short, rows in seen_by(model, "experts", batches).items():
        expected = torch.stack([each.T @ each for each in rows])
        found = seen.grams[f"experts.{short}"].double()
        assert (
            found - expected
        ).norm() <= 0.01 * expected.norm()  # bfloat16 rounds what is between
    graph = captured(model, arguments_of(batches[0])).graph
    assert len(graph.find_nodes(op="call_function", target=torch.ops.aten._grouped_mm.default)) == 2


def test_without_data_each_expert_is_a_linear_of_its_own() -> None:
    model, _ = moe_and_data()
    half = sparsefx.Unstructured(0.5)
    with torch.no_grad():
        model.experts.get_parameter("down_proj")[0] *= 100
    found = sparsefx.sparsify(model, sparsefx.Recipe({"experts.*": half}), progress=False)
    for name in ("experts.gate_up_proj", "experts.down_proj"):
        for own, dense in zip(experts_of(found, name), experts_of(model, name), strict=True):
            assert torch.equal(own, dense * half.keep(dense.abs()))
    chance = sparsefx.Recipe({"experts.*": sparsefx.NM(2, 4, sparsefx.Random())})
    masks = [
        each != 0 for each in experts_of(sparsefx.sparsify(model, chance, progress=False), name)
    ]
    assert not any(torch.equal(masks[0], other) for other in masks[1:])


@pytest.mark.parametrize("criterion", CRITERIA)
def test_an_expert_without_tokens_goes_by_magnitude(criterion: Criterion) -> None:
    model, batches = moe_and_data(closed=1)
    pattern = sparsefx.NM(2, 4, criterion)
    found = pruned(model, batches, {"experts.*": pattern})
    for line in sparsefx.pruning_report(found).layers:
        assert line.note == "1 of 4 experts saw no input and went by magnitude"
        assert line.error is not None and 0 < line.error < 1
        dense, own = (experts_of(each, line.name)[-1] for each in (model, found))
        assert torch.equal(own, dense * pattern.keep(dense.abs()))
        reached = experts_of(found, line.name)[0] != 0
        assert not torch.equal(reached, pattern.keep(experts_of(model, line.name)[0].abs()))


def test_only_stacks_of_experts_are_taken_for_such() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_experts, self.is_transposed = 4, False
            self.weight = nn.Parameter(torch.randn(4, 8, 8))

    assert not prunable_weights(Other())
    names = [name for name in prunable_weights(mixtral().model) if STACK in name]
    assert names == [f"{STACK}.gate_up_proj", f"{STACK}.down_proj"]


def test_experts_run_in_another_way_are_named() -> None:
    model, batches = moe_and_data()
    model.experts.config._experts_implementation = "batched_mm"  # type: ignore[union-attr]
    with pytest.raises(UnobservedLayer, match=r"experts.gate_up_proj, experts.down_proj as a"):
        pruned(model, batches, {"experts.*": sparsefx.NM(2, 4, sparsefx.Wanda())})


class Grouped(nn.Module):
    """A convolution of two groups, of which the second sees some channels much larger."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(16, 12, 3, groups=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


def uneven(seed: int = 0) -> Tensor:
    """[samples, 16, 7, 7]; of the first group channels 0 to 3 are large, of the second 4 to 7."""
    x = torch.randn(6, 16, 7, 7, generator=torch.Generator().manual_seed(seed))
    x[:, [0, 1, 2, 3, 12, 13, 14, 15]] *= 20
    return x


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("kind", ["2:4", "unstructured"])
def test_a_group_is_pruned_as_a_convolution_of_its_own(criterion: Criterion, kind: str) -> None:
    make = {
        "2:4": sparsefx.NM(2, 4, criterion),
        "unstructured": sparsefx.Unstructured(0.5, criterion),
    }
    model, data = Grouped().eval(), [{"x": uneven(seed)} for seed in range(2)]
    found = pruned(model, data, {"conv.*": make[kind]}).get_parameter("conv.weight")
    for group in range(2):
        alone = nn.Sequential(nn.Conv2d(8, 6, 3, bias=False)).eval()
        alone.load_state_dict({"0.weight": model.conv.weight[6 * group :][:6]})
        own = [{"input": batch["x"][:, 8 * group :][:, :8]} for batch in data]
        expected = pruned(alone, own, {"*": make[kind]}).get_parameter("0.weight")
        torch.testing.assert_close(found[6 * group :][:6], expected)
    if kind == "unstructured":  # large inputs keep more of their weights, group by group
        kept = (found != 0).float().mean((2, 3)).unflatten(0, (2, 6)).mean(1)  # [group, channel]
        assert bool(
            (kept[0, :4].min() > kept[0, 4:].max()) & (kept[1, 4:].min() > kept[1, :4].max())
        )


def test_magnitude_compares_the_filters_of_all_groups() -> None:
    model = Grouped().eval()
    with torch.no_grad():
        model.conv.weight[:6] *= 100
    recipe = sparsefx.Recipe({"conv.*": sparsefx.Unstructured(0.5)})
    found = sparsefx.sparsify(model, recipe, progress=False).get_parameter("conv.weight")
    assert float((found[:6] != 0).float().mean()) > 0.9


def test_no_block_crosses_two_parts() -> None:
    tall = sparsefx.Block(4, 8, 0.5)
    with pytest.raises(PatternDoesNotFit, match="6 x 8 is not a grid of 4 x 8 blocks"):
        pruned(Grouped().eval(), [{"x": uneven()}], {"conv.*": tall})
    model, _ = moe_and_data()
    found = sparsefx.sparsify(model, sparsefx.Recipe({"experts.gate*": tall}), progress=False)
    for own in experts_of(found, "experts.gate_up_proj"):
        tiles = (own != 0).unflatten(1, (-1, 8)).unflatten(0, (-1, 4)).transpose(1, 2).flatten(2)
        assert bool((tiles.all(2) | ~tiles.any(2)).all())
        assert int(tiles.any(2).sum()) == tiles.any(2).numel() // 2


@pytest.mark.parametrize(
    "pattern",
    [
        *(None, sparsefx.Unstructured(0.3), sparsefx.NM(1, 4), sparsefx.Block(4, 8, 0.3)),
        *(sparsefx.Rows(0.3), sparsefx.Columns(0.3)),
    ],
)
def test_what_a_pattern_keeps_of_experts_is_counted_expert_by_expert(
    pattern: Pattern | None,
) -> None:
    model, _ = moe_and_data()
    name = "experts.gate_up_proj"
    found = sparsefx.sparsify(model, sparsefx.Recipe({name: pattern}), progress=False)
    layer = layer_of(prunable_weights(found)[name], "")
    kept = int(found.get_parameter(name).count_nonzero())
    assert cost(pattern, layer, "parameters") == kept
    assert layer.numel == found.get_parameter(name).numel() and layer.shape == (48, 16)


@pytest.mark.parametrize("spread", [er, erk])
def test_a_stack_gets_the_budget_of_as_many_layers(
    spread: Callable[[list[Layer], float], dict[str, float]],
) -> None:
    other, stack = Layer("other", "", (200, 16)), Layer("stack", "", (48, 16), parts=4)
    single = [Layer(str(number), "", (48, 16)) for number in range(4)]
    alone, found = spread([other, *single], 0.6), spread([other, stack], 0.6)
    assert found["other"] == pytest.approx(alone["other"])
    assert found["stack"] == pytest.approx(alone["0"]) and found["stack"] != found["other"]
    device = devices.named("A100")
    times = {cost(each, stack, "time", device, 64) for each in (None, sparsefx.NM(2, 4))}
    assert len(times) == 1  # no kernel takes stacks


def test_importance_of_an_experts_outputs_is_that_of_its_own_rows() -> None:
    model, batches = moe_and_data()
    weights = {n: w for n, w in prunable_weights(model).items() if n.startswith("experts")}
    found = squared_gradients(model, batches, weights)
    sums: dict[tuple[str, int], list[Tensor]] = {}

    def took(name: str, expert: int, gradient: Tensor) -> None:
        sums.setdefault((name, expert), []).append(gradient.double().square())

    explicit = copy.deepcopy(model)
    explicit.experts.forward = one_by_one(explicit.experts, took)  # type: ignore[method-assign]
    for number, batch in enumerate(batches):
        output = explicit(**batch)
        random = torch.Generator().manual_seed(number)
        signs = torch.randint(0, 2, output.shape, generator=random) * 2 - 1
        output.backward(signs.float())
    for (short, expert), squares in sums.items():
        own = found[f"experts.{short}"].chunk(EXPERTS)[expert]
        torch.testing.assert_close(own, torch.cat(squares).mean(0), rtol=1e-4, atol=1e-12)
    assert len(sums) == 2 * EXPERTS


def test_errors_of_parts_add_up() -> None:
    model, batches = moe_and_data()
    name, half = "experts.down_proj", sparsefx.NM(2, 4)
    importance = {name: torch.rand(EXPERTS * 16, dtype=torch.float64)}
    data = Data(model, batches, progress=False)
    by_loss, by_output = (
        error_table(data, {name: half}, {name: (half, None)}, each)[name]
        for each in (importance, None)
    )
    lost, whole, weighted = 0.0, 0.0, 0.0
    rows = seen_by(model, "experts", batches)["down_proj"]
    parts = zip(experts_of(model, name), rows, importance[name].chunk(EXPERTS), strict=True)
    for dense, read, own in parts:
        change = ((dense - dense * half.keep(dense.abs())).double() @ read.T).square().sum(1)
        weighted += float(change @ own)
        lost, whole = (
            lost + float(change.sum()),
            whole + float((dense.double() @ read.T).square().sum()),
        )
    assert by_output == [pytest.approx(lost / whole, rel=1e-4), 0]
    assert by_loss == [pytest.approx(weighted / 2 / 4, rel=1e-4), 0]  # of 4 samples


def test_saved_loaded_and_compiled(tmp_path: Path) -> None:
    model, batches = mixtral_and_data()
    found = pruned(model, batches, {"model.layers.*": sparsefx.NM(2, 4, sparsefx.Wanda())})
    sparsefx.save(found, tmp_path)
    again = sparsefx.load(tmp_path, mixtral().model)
    for (name, mine), other in zip(found.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, other), name
    stored = sum(file.stat().st_size for file in tmp_path.iterdir())
    dense = sum(weight.nbytes for weight in model.parameters())
    assert stored < 0.75 * dense  # embeddings and norms stay dense
    compiled = sparsefx.compile(again)
    with torch.no_grad():
        expected = found(**batches[0]).logits
        torch.testing.assert_close(compiled(**batches[0]).logits, expected, rtol=1e-4, atol=1e-5)
    rows = [row for row in sparsefx.explain(compiled).rows if row.op == "experts"]
    assert {f"{STACK}.gate_up_proj", f"{STACK}.down_proj"} <= {row.name for row in rows}


def test_goes_on_from_its_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = mixtral_and_data()
    recipe = sparsefx.Recipe({"model.layers.*": sparsefx.Unstructured(0.5, sparsefx.SparseGPT())})
    whole = sparsefx.sparsify(model, recipe, batches, progress=False)
    original, calls = decide.record_of, []

    def stopping(layer: Observed, *others: object) -> object:
        calls.append(layer.weight.name)
        if len(calls) == 8:  # in the second of two blocks of six weights
            raise KeyboardInterrupt
        return original(layer, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(decide, "record_of", stopping)
    with pytest.raises(KeyboardInterrupt):
        sparsefx.sparsify(model, recipe, batches, progress=False, state=tmp_path)
    resumed = sparsefx.sparsify(model, recipe, batches, progress=False, state=tmp_path)
    assert len(calls) == 8 + 6
    for mine, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, other)
