"""sparsify() prunes what the recipe names, annotates it, and leaves the model alone on failure."""

import copy
from typing import TypeVar

import pytest
import torch
from torch import Tensor, nn

from sparsefx.annotations import annotate, annotations
from sparsefx.api import sparsify
from sparsefx.errors import (
    EmptyCalibration,
    NonFiniteWeight,
    NothingMatches,
    PatternDoesNotFit,
    SparseFXError,
)
from sparsefx.prune.weights import prunable_weights
from sparsefx.spec import NM, Block, Pattern, Recipe, Unstructured

M = TypeVar("M", bound=nn.Module)


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8, bias=False))


class TiedLanguageModel(nn.Module):
    """An embedding whose matrix is also the output head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(24, 16)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 24, bias=False)
        self.head.weight = self.embed.weight


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return list(after) == list(before) and all(
        torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8))
        for name in before
    )


def run(model: M, weights: dict[str, Pattern | None], inplace: bool = False) -> M:
    return sparsify(model, Recipe(weights), inplace=inplace, progress=False)


def weight(model: nn.Module, layer: int = 0) -> nn.Parameter:
    return model.get_parameter(f"{layer}.weight")


@pytest.mark.parametrize("inplace", [False, True])
def test_prunes_by_magnitude_and_keeps_the_rest_bit_for_bit(inplace: bool) -> None:
    model = mlp()
    before = state(model)
    pruned = run(model, {"0.*": NM(2, 4), "2.*": Unstructured(0.5)}, inplace=inplace)
    assert (pruned is model) == inplace
    assert inplace or unchanged(model, before)
    patterns: dict[str, Pattern] = {"0.weight": NM(2, 4), "2.weight": Unstructured(0.5)}
    for name, pattern in patterns.items():
        keep = pattern.keep(before[name].abs())
        assert torch.equal(pruned.state_dict()[name], before[name] * keep)
    assert torch.equal(pruned.state_dict()["0.bias"], before["0.bias"])
    assert annotations(pruned) == patterns


def test_same_class_same_parameters_still_trainable() -> None:
    model = mlp()
    pruned = run(model, {"*": NM(2, 4)})
    assert type(pruned) is type(model)
    assert [p.requires_grad for p in pruned.parameters()] == [True] * 3
    identities = [id(parameter) for parameter in model.parameters()]
    run(model, {"*": NM(2, 4)}, inplace=True)
    assert [id(parameter) for parameter in model.parameters()] == identities


def test_writing_in_place_is_seen_by_version_counters() -> None:
    model = mlp()
    before = weight(model)._version
    run(model, {"0.*": NM(2, 4)}, inplace=True)
    assert weight(model)._version > before


def test_annotations_survive_deepcopy_and_stay_out_of_the_state_dict() -> None:
    pruned = run(mlp(), {"0.*": NM(2, 4)})
    names = list(pruned.state_dict())
    assert annotations(copy.deepcopy(pruned)) == {"0.weight": NM(2, 4)}
    assert names == list(mlp().state_dict())
    annotations(pruned).clear()  # a copy: the model keeps its own
    annotate(pruned, {"2.weight": NM(1, 4)})
    assert annotations(pruned) == {"0.weight": NM(2, 4), "2.weight": NM(1, 4)}
    assert annotations(mlp()) == {}


def test_first_match_wins_and_none_stays_dense() -> None:
    model = mlp()
    pruned = run(model, {"2.*": None, "*": NM(1, 4)})
    assert torch.equal(weight(pruned, 2), weight(model, 2))
    assert list(annotations(pruned)) == ["0.weight"]


def test_linear_groups_run_along_the_input() -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    weight(model).data = torch.tensor([[4.0, 3, 2, 1], [1, 2, 3, 4], [1, 4, 2, 3]])
    pruned = run(model, {"*": NM(2, 4)})
    assert weight(pruned).tolist() == [[4, 3, 0, 0], [0, 0, 3, 4], [0, 4, 0, 3]]


def test_conv1d_weights_are_pruned_transposed() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    model = nn.Sequential(pytorch_utils.Conv1D(6, 8))  # 8 inputs, 6 outputs, weight [8, 6]
    pruned = run(model, {"*": NM(2, 4)})
    expected = weight(model).t() * NM(2, 4).keep(weight(model).t().abs())
    assert torch.equal(weight(pruned), expected.t())
    assert ((weight(pruned) != 0).view(2, 4, 6).sum(1) == 2).all()


def test_conv2d_groups_run_along_the_input_channels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 4, 3))
    pruned = run(model, {"*": NM(2, 4)})
    sizes = weight(model).permute(0, 2, 3, 1).reshape(-1, 4).abs()
    kept = (weight(pruned) != 0).permute(0, 2, 3, 1).reshape(-1, 4)
    assert (kept.sum(1) == 2).all()
    assert (sizes.masked_fill(kept, 0).amax(1) < sizes.masked_fill(~kept, 9).amin(1)).all()
    blocks = weight(run(model, {"*": Block(2, 4, 0.5)})).permute(0, 2, 3, 1).reshape(4, 72)
    tiles = (blocks != 0).view(2, 2, 18, 4).permute(0, 2, 1, 3).reshape(36, 8)
    assert (tiles.all(1) | ~tiles.any(1)).all()
    assert int(tiles.any(1).sum()) == 18


def test_channels_that_m_does_not_divide_do_not_fit_even_if_taps_fill_up() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 2))  # 2 channels x 4 taps are 8, yet no group of 4 fits
    with pytest.raises(PatternDoesNotFit, match=r"2:4 does not fit 0.weight of shape \(4, 2, 2, 2"):
        run(model, {"*": NM(2, 4)})


def test_depthwise_convolutions_are_left_alone_unless_named() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1))
    assert list(annotations(run(model, {"*": NM(2, 4)}))) == ["1.weight"]
    named = run(model, {"0.weight": Unstructured(0.5)})
    assert int((weight(named) == 0).sum()) == 36
    with pytest.raises(PatternDoesNotFit):
        run(model, {"0.weight": NM(2, 4)})


@pytest.mark.parametrize("key", ["head.weight", "embed.weight"])
def test_a_head_tied_to_the_embedding_is_pruned_only_by_its_exact_name(key: str) -> None:
    model = TiedLanguageModel()
    assert list(annotations(run(model, {"*": NM(2, 4)}))) == ["body.weight"]
    pruned = run(model, {key: NM(2, 4)})
    assert set(annotations(pruned)) == {"head.weight", "embed.weight"}
    assert pruned.head.weight is pruned.embed.weight
    assert (pruned.head.weight == 0).sum() == 24 * 8
    with pytest.raises(NothingMatches, match="only its exact name selects it"):
        run(model, {"head*": NM(2, 4)})
    assert annotations(run(model, {"head*": None})) == {}


def test_layers_that_share_a_weight_are_pruned_once_under_every_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    assert list(prunable_weights(model)) == ["0.weight"]
    pruned = run(model, {"1.*": NM(2, 4)})
    assert annotations(pruned) == {"0.weight": NM(2, 4), "1.weight": NM(2, 4)}
    assert weight(pruned) is weight(pruned, 1)


def test_what_is_not_a_float_parameter_is_not_prunable() -> None:
    model = nn.ModuleDict(
        {
            "lazy": nn.LazyLinear(4),
            "norm": nn.LayerNorm(4),
            "embed": nn.Embedding(4, 4),
            "computed": nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)),
            "good": nn.Linear(4, 4),
        }
    )
    assert list(prunable_weights(model)) == ["good.weight"]


def test_ties_and_repetition_give_the_same_masks() -> None:
    model = nn.Sequential(nn.Linear(8, 2))
    nn.init.ones_(weight(model))
    first, second = (weight(run(model, {"*": NM(2, 4)})) for _ in range(2))
    assert torch.equal(first, second)
    assert first[0].tolist() == [1, 1, 0, 0] * 2


def poisoned(value: float) -> nn.Sequential:
    model = mlp()
    weight(model, 2).data[1, 3] = value
    return model


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("model", "weights", "calibration", "error", "says"),
    [
        (mlp(), {"0.*": NM(2, 4), "9.*": NM(2, 4)}, None, NothingMatches, "'9.*' matches no"),
        (mlp(), {"*.bias": NM(2, 4)}, None, NothingMatches, "0.weight, 2.weight"),
        (mlp(), {"nothing": None}, None, NothingMatches, "of Sequential"),
        (nn.ReLU(), {"*": NM(2, 4)}, None, NothingMatches, "there is no nn.Linear"),
        (mlp(), {"0.*": NM(2, 4), "2.*": Block(3, 4, 0.5)}, None, PatternDoesNotFit, "2.weight"),
        (poisoned(float("nan")), {"*": NM(2, 4)}, None, NonFiniteWeight, "2.weight has 1 NaN"),
        (poisoned(float("-inf")), {"*": NM(2, 4)}, None, NonFiniteWeight, "2.weight has 1 NaN"),
        (mlp(), {"*": NM(2, 4)}, [], EmptyCalibration, "at least one batch"),
    ],
)
def test_failures_are_typed_and_leave_the_model_unchanged(
    model: nn.Module,
    weights: dict[str, Pattern | None],
    calibration: list[Tensor] | None,
    error: type[SparseFXError],
    says: str,
    inplace: bool,
) -> None:
    before = state(model)
    with pytest.raises(error) as caught:
        sparsify(model, Recipe(weights), calibration, inplace=inplace, progress=False)
    assert says in str(caught.value)
    assert unchanged(model, before)
    assert annotations(model) == {}


def test_a_nan_in_a_weight_that_stays_dense_is_not_our_business() -> None:
    assert list(annotations(run(poisoned(float("nan")), {"0.*": NM(2, 4)}))) == ["0.weight"]


def test_calibration_is_accepted_and_an_empty_recipe_prunes_nothing() -> None:
    model = mlp()
    sparsify(model, Recipe({"*": NM(2, 4)}), [torch.ones(1, 16)], progress=False)
    same = sparsify(model, Recipe(), progress=False)
    assert unchanged(same, state(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    pruned = run(mlp().to(dtype), {"*": NM(2, 4)})
    assert {parameter.dtype for parameter in pruned.parameters()} == {dtype}
    assert (weight(pruned) == 0).sum() == 256


def test_progress_goes_to_stderr_and_only_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    run(mlp(), {"*": NM(2, 4)})
    assert capsys.readouterr() == ("", "")
    sparsify(mlp(), Recipe({"*": NM(2, 4)}))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "sparsify" in shown.err and "2/2" in shown.err
