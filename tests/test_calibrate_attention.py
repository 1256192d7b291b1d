"""Calibration from a model and batches to thresholds: doors, resumption, goals, errors."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from sparsefx.attention.spec import AttentionPattern, SkipSoftmax, Theta
from sparsefx.attention.thresholds import AttentionThresholds, SkipThresholds, ThetaThresholds
from sparsefx.attention.wanted import Wanted
from sparsefx.calibrate.attention.calibration import calibrate_attention
from sparsefx.calibrate.door import through_passes
from sparsefx.errors import (
    AttentionNotFound,
    EmptyCalibration,
    ForeignCalibration,
    NonFiniteAttention,
    NothingMatches,
    ShortCalibration,
)
from sparsefx.passes.threshold_softmax import ThresholdSoftmax
from sparsefx.spec import Recipe
from tests.hf_models import ids

TILE = (16, 16)
DIM, HEADS, KV_HEADS = 16, 4, 2


class Attention(nn.Module):
    """Grouped attention that looks mostly at itself, its neighbours and the first row."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, (HEADS + 2 * KV_HEADS) * DIM)
        self.out = nn.Linear(HEADS * DIM, DIM)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        sizes = [HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM]
        q, k, v = self.qkv(x).split(sizes, -1)
        q, k, v = (each.unflatten(-1, (-1, DIM)).transpose(1, 2) for each in (q, k, v))
        place = torch.arange(x.shape[1]) / x.shape[1]
        wave = torch.stack(((3 * place).cos(), (3 * place).sin()), -1) * 6
        q, k = q + F.pad(wave, (0, DIM - 2)), k + F.pad(wave, (0, DIM - 2))
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        return self.out(y.transpose(1, 2).flatten(2))


class Layers(nn.Module):
    """Attentions one after the other, with a dropout that eval mode turns off."""

    def __init__(self, number: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(number))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = x + self.dropout(layer(x, mask))
        return x


@pytest.fixture
def model() -> Layers:
    torch.manual_seed(0)
    return Layers()


def inputs(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, length, DIM, generator=generator) for length in lengths]


def calibrate(
    model: nn.Module, asked: AttentionPattern, batches: list[object], state: Path | None = None
) -> dict[str, AttentionThresholds]:
    recipe = Recipe(attention=asked)
    return calibrate_attention(model, recipe, batches, tile=TILE, state=state, progress=False)


def test_thresholds_come_under_the_names_of_the_modules(model: Layers) -> None:
    found = calibrate(model, SkipSoftmax(sparsity=0.3), inputs(120, 96))
    assert list(found) == ["layers.0", "layers.1"]
    for each in found.values():
        assert isinstance(each, SkipThresholds)
        assert (each.heads, each.tile, each.keys) == (HEADS, TILE, (96, 120))
        assert all(error is not None and 0 < error < 1 for error in each.error)
    for phase in (0, 1):
        skipped = [each.skipped[phase] for each in found.values()]
        assert sum(skipped) / 2 == pytest.approx(0.3, abs=0.03)


def test_the_model_is_left_as_it_was(model: Layers) -> None:
    model.train()
    model.layers[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = set(vars(model))
    calibrate(model, SkipSoftmax(error=0.1), inputs(80))
    assert model.training and model.dropout.training and not model.layers[1].training
    assert set(vars(model)) == attributes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_is_off_and_results_are_deterministic(model: Layers) -> None:
    model.train()
    asked = SkipSoftmax(error=0.05)
    assert calibrate(model, asked, inputs(80)) == calibrate(model.eval(), asked, inputs(80))


def test_a_batch_is_a_tensor_a_tuple_or_a_mapping(model: Layers) -> None:
    x, asked = inputs(80)[0], SkipSoftmax(scale_factor=2.0)
    expected = calibrate(model, asked, [x])
    assert calibrate(model, asked, [(x,)]) == calibrate(model, asked, [[x]]) == expected
    assert calibrate(model, asked, [hf.BatchEncoding({"x": x})]) == expected


def test_given_factors_are_measured_as_the_graph_will_run_them(model: Layers) -> None:
    """skipped and error of the first layer are those of the thresholded graph itself."""
    asked, x = SkipSoftmax(scale_factor=(9.0, 1.0)), inputs(120)[0]
    found = calibrate(model, asked, [x])["layers.0"]
    assert isinstance(found, SkipThresholds) and found.prefill == (9.0,) * HEADS
    model.eval()
    results = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        results.append(args[0])

    with torch.no_grad():
        for thresholds in ({}, {"layers.0": found}):
            handle = model.layers[0].out.register_forward_pre_hook(keep)
            through_passes(model, (ThresholdSoftmax(Wanted(thresholds)),))(x)
            handle.remove()
    dense, sparse = results
    assert float((sparse - dense).norm() / dense.norm()) == pytest.approx(found.error[0], rel=1e-4)
    assert found.error[0] > 1e-3


def test_padding_masks_are_read(model: Layers) -> None:
    """A batch of a short and a long row, padded, is as good as both alone."""
    short, long = inputs(90, 120)
    both = torch.cat((F.pad(short, (0, 0, 0, 30), value=7.0), long))
    seen = torch.ones(120, 120, dtype=torch.bool).tril().expand(2, 1, 120, 120).clone()
    seen[0, :, :, 90:] = False
    seen[0, :, 90:] = False
    asked = SkipSoftmax(scale_factor=1e9)  # lambda is 1 whatever the length
    alone = calibrate(model, asked, [short, long])["layers.0"]
    found = calibrate(model, asked, [{"x": both, "mask": seen}])["layers.0"]
    # The wave of the second follows the padded length, which only the short one feels.
    assert found.skipped[0] == pytest.approx(alone.skipped[0], abs=0.05)
    blind = seen.clone()
    blind[0] = False  # the whole short row is padding
    only = calibrate(model, asked, [long])["layers.0"]
    found = calibrate(model, asked, [{"x": both, "mask": blind}])["layers.0"]
    assert found.skipped == only.skipped
    assert found.error == pytest.approx(only.error) and found.lost_mass == pytest.approx(
        only.lost_mass
    )


class Interrupted(Exception):
    """Stands for a killed process."""


def killed_after(batches: list[Tensor], number: int) -> Iterator[Tensor]:
    yield from batches[:number]
    raise Interrupted


@pytest.mark.parametrize(
    ("asked", "number"),
    [(SkipSoftmax(error=0.05), 0), (SkipSoftmax(error=0.05), 2), (Theta(k=8, dense_layers=1), 1)],
)
def test_a_killed_calibration_goes_on_to_the_same_thresholds(
    asked: AttentionPattern, number: int, model: Layers, tmp_path: Path
) -> None:
    batches, state = inputs(80, 120, 100), tmp_path / "state.safetensors"
    with pytest.raises(Interrupted):
        calibrate_attention(
            model, Recipe(attention=asked), killed_after(batches, number), tile=TILE, state=state,
            progress=False,
        )  # fmt: skip
    assert state.exists() == (number > 0)
    resumed = calibrate(model, asked, batches, state)
    assert resumed == calibrate(model, asked, batches)
    assert calibrate(model, asked, batches, state) == resumed  # nothing left to do


def test_a_finished_state_answers_another_goal(model: Layers, tmp_path: Path) -> None:
    state, batches = tmp_path / "state", inputs(120, 80)
    calibrate(model, SkipSoftmax(sparsity=0.2), batches, state)
    content = state.read_bytes()
    asked = SkipSoftmax(error=0.02)
    assert calibrate(model, asked, batches, state) == calibrate(model, asked, batches)
    assert state.read_bytes() == content


def test_a_foreign_state_is_refused(model: Layers, tmp_path: Path) -> None:
    state = tmp_path / "state"
    calibrate(model, SkipSoftmax(sparsity=0.2), inputs(80), state)
    content = state.read_bytes()
    with pytest.raises(ForeignCalibration, match="another model, recipe or tile"):
        calibrate(model, SkipSoftmax(sparsity=0.2, order="ascending"), inputs(80), state)
    with pytest.raises(ForeignCalibration, match="another model"):
        calibrate(Layers(3), SkipSoftmax(sparsity=0.2), inputs(80), state)
    assert state.read_bytes() == content
    state.write_bytes(content[:100])
    with pytest.raises(ForeignCalibration, match="cannot be read"):
        calibrate(model, SkipSoftmax(sparsity=0.2), inputs(80), state)


def test_globs_choose_and_must_match(model: Layers) -> None:
    some = Recipe(attention={"*.0": None, "layers.*": SkipSoftmax(scale_factor=1.0)})
    found = calibrate_attention(model, some, inputs(80), tile=TILE, progress=False)
    assert list(found) == ["layers.1"]
    none = Recipe(attention={"layers.*": SkipSoftmax(scale_factor=1.0), "*.cross": None})
    with pytest.raises(
        AttentionNotFound, match=r"'\*\.cross' matches no attention of Layers.*layers.0"
    ):
        calibrate_attention(model, none, inputs(80), tile=TILE, progress=False)
    assert issubclass(AttentionNotFound, NothingMatches)


def test_short_empty_and_bad_data_are_refused(model: Layers) -> None:
    with pytest.raises(ShortCalibration, match="layers.0 has 63 keys and a tile has 16"):
        calibrate(model, SkipSoftmax(sparsity=0.3), inputs(20, 63))
    assert calibrate(model, SkipSoftmax(scale_factor=1.0), inputs(20))["layers.0"].heads == HEADS
    with pytest.raises(EmptyCalibration):
        calibrate(model, SkipSoftmax(sparsity=0.3), [])
    x = inputs(80)[0]
    x[0, 7] = math.nan
    for asked in (SkipSoftmax(sparsity=0.3), Theta(k=8)):
        with pytest.raises(NonFiniteAttention, match="layers.0 has NaN"):
            calibrate(model, asked, [x])


class Metric:
    """A loss of 1 + the summed error of the thresholds it was built with; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.error = 0.0

    def __call__(self, model: nn.Module) -> float:
        self.calls += 1
        return 1 + self.error

    def build(self, thresholds: Mapping[str, AttentionThresholds]) -> nn.Module:
        self.error = sum(each.error[0] or 0.0 for each in thresholds.values())
        return nn.Identity()


@pytest.mark.parametrize("within", [0.001, 0.02, 0.9])
def test_the_budget_is_cut_until_the_users_loss_bears_it(model: Layers, within: float) -> None:
    metric = Metric()
    asked = SkipSoftmax(sparsity=0.4, metric=metric, within=within)
    recipe, batches = Recipe(attention=asked), inputs(120)
    found = calibrate_attention(
        model, recipe, batches, tile=TILE, progress=False, build=metric.build
    )
    full = calibrate(model, SkipSoftmax(sparsity=0.4), batches)
    errors = [sum(each.error[0] for each in which.values()) for which in (found, full)]
    assert metric.calls <= 6 and errors[0] <= within
    assert (errors[0] == errors[1]) == (errors[1] <= within)
    if within == 0.02:
        assert errors[0] > 0


def test_a_small_llama_end_to_end() -> None:
    """Both kinds on a Hugging Face model, with and without a cache, laid on and run."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    llama = hf.LlamaForCausalLM(config).eval()
    recipe = Recipe(
        attention={
            "model.layers.0.*": SkipSoftmax(scale_factor=1e9),
            "model.layers.1.*": Theta(k=16, dense_layers=0),
        }
    )
    batches = [{"input_ids": ids(2, 80), "use_cache": False}, ids(1, 80)]
    found = calibrate_attention(llama, recipe, batches, tile=TILE, progress=False)
    first, second = found["model.layers.0.self_attn"], found["model.layers.1.self_attn"]
    assert isinstance(first, SkipThresholds) and first.keys == (80, 80)
    assert first.skipped[0] > 0.005 and first.skipped[1] > 0.005
    assert isinstance(second, ThetaThresholds) and second.kept is not None
    assert 16 / 80 < second.kept < 1.5 * 16 / 40
    run = through_passes(llama, (ThresholdSoftmax(Wanted(found)),))
    with torch.no_grad():
        sparse = run(input_ids=ids(2, 80), use_cache=False).logits
        dense = llama(input_ids=ids(2, 80), use_cache=False).logits
    assert 0 < float((sparse - dense).norm() / dense.norm()) < 0.5
