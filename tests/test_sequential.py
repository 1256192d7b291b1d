"""The sequential driver against hooks on a copy of the model, in float64."""

import pytest
import torch
from torch import Tensor, nn

from sparsefx.calibrate.sequential import Block, Visited, run_blocks
from tests import hf_models
from tests.block_visits import Recorder, assert_sequential, needs_of, nothing, varied, wanda
from tests.test_blocks import Stages


@pytest.mark.parametrize(
    "case", ["llama", "llama_padded", "llama_cached", "bert", "gpt2", "vit", "mixtral"]
)
def test_every_block_sees_what_the_pruned_blocks_before_it_give(case: str) -> None:
    torch.manual_seed(0)
    model, batch, _, _ = hf_models.CASES[case]()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    batches = varied(batch, 2)
    seen = Recorder()
    with run_blocks(model, iter(batches), needs_of(model), seen, progress=False) as results:
        weights = dict(results.weights())
        assert [facts["layers"] for facts in results.facts] == seen.blocks
    assert weights.keys() == needs_of(model).keys()
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    mask = batch.get("attention_mask")
    counted = mask.bool() if isinstance(mask, Tensor) else None
    assert_sequential(model, batches, seen, weights, counted)


def test_cnn_with_writes_in_place() -> None:
    torch.manual_seed(0)
    model = Stages().train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
    batches = [{"x": torch.randn(3, 3, 9, 9)} for _ in range(2)]
    pixels = [batch["x"].clone() for batch in batches]
    seen = Recorder()
    with run_blocks(model, batches, needs_of(model), seen, progress=False) as results:
        weights = dict(results.weights())
    assert model.training and len(seen.blocks) == 5
    assert all(torch.equal(batch["x"], old) for batch, old in zip(batches, pixels, strict=True))
    assert_sequential(model, batches, seen, weights)
    assert seen.counts["layer1.0.conv1.weight"] == [2 * 3 * 7 * 7, 2 * 3]


def test_layers_of_torch_itself_with_padding() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    padding = torch.tensor([[False, False, True], [False, False, False]])
    batches = [{"src": torch.randn(2, 3, 16), "src_key_padding_mask": padding}]
    seen = Recorder()
    with run_blocks(model, batches, needs_of(model), seen, progress=False) as results:
        assert len(dict(results.weights())) == 6
        assert seen.counts["layers.1.linear1.weight"] == [6, 2]


def test_a_visit_that_changes_nothing_sees_the_dense_model() -> None:
    model, batch, _, _ = hf_models.llama()
    batches = varied(batch, 2)
    seen = Recorder(nothing)
    with run_blocks(model, batches, needs_of(model), seen, progress=False) as results:
        assert results.facts == [{"number": number, "of": 3} for number in range(3)]
        assert not dict(results.weights())
    assert_sequential(model, batches, seen, {})


def test_some_blocks_changed_and_some_left() -> None:
    model, batch, _, _ = hf_models.vit()
    batches = varied(batch, 2)
    seen = Recorder(lambda block: wanda(block) if block.number in (1, 2) else Visited())
    with run_blocks(model, batches, needs_of(model), seen, progress=False) as results:
        weights = dict(results.weights())
    assert len(seen.blocks) == 4
    assert weights.keys() == {*seen.blocks[1], *seen.blocks[2]}
    assert_sequential(model, batches, seen, weights)


def test_only_some_layers_and_some_without_statistics() -> None:
    model, batch, _, _ = hf_models.llama()
    needs = {
        "model.layers.0.mlp.up_proj.weight": frozenset[str](),
        "model.layers.1.mlp.down_proj.weight": frozenset({"gram", "squares"}),
    }
    asked: list[tuple[str, int, dict[str, list[str]]]] = []

    def visit(block: Block) -> Visited:
        layers = {name: sorted(layer.statistics[0]) for name, layer in block.layers.items()}
        asked.append((block.name, block.count, layers))
        return Visited(
            {name: torch.zeros_like(each.weight.parameter) for name, each in block.layers.items()}
        )

    with run_blocks(model, [batch], needs, visit, progress=False) as results:
        assert [name for name, _ in results.weights()] == list(needs)
    assert asked == [
        ("model.layers.0", 2, {"model.layers.0.mlp.up_proj.weight": []}),
        ("model.layers.1", 2, {"model.layers.1.mlp.down_proj.weight": ["gram", "squares"]}),
    ]


def test_layers_that_read_one_value_share_its_statistics() -> None:
    model, batch, _, _ = hf_models.llama()
    shared: list[bool] = []

    def visit(block: Block) -> Visited:
        of = {name.split(".")[-2]: each.statistics[0] for name, each in block.layers.items()}
        if "q_proj" in of:
            shared.append(of["q_proj"]["gram"] is of["k_proj"]["gram"] is of["v_proj"]["gram"])
            shared.append(of["q_proj"]["gram"] is not of["o_proj"]["gram"])
        return Visited()

    run_blocks(model, [batch], needs_of(model), visit, progress=False).close()
    assert shared == [True] * 4


def test_a_layer_called_twice_adds_up_both_inputs() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)
    model = nn.Sequential(nn.Linear(6, 6), shared, nn.Tanh(), shared, nn.Linear(6, 2))
    batches: list[dict[str, object]] = [{"input": torch.randn(5, 6)}]
    seen = Recorder()
    with run_blocks(model, batches, needs_of(model), seen, progress=False) as results:
        weights = dict(results.weights())
    assert seen.blocks == [["0.weight"], ["1.weight"], ["4.weight"]]
    assert seen.counts["1.weight"] == [10, 10]
    assert_sequential(model, batches, seen, weights)


def test_batches_of_several_signatures() -> None:
    model = hf_models.gpt2().model
    batches = [dict(hf_models.gpt2(2, length).kwargs) for length in (5, 9, 5)]
    seen = Recorder()
    with run_blocks(model, batches, needs_of(model), seen, progress=False) as results:
        assert_sequential(model, batches, seen, dict(results.weights()))
    assert seen.counts["transformer.h.1.mlp.c_proj.weight"] == [38, 6]
