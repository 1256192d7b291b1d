"""Squared gradients of the loss at layers' outputs, against autograd on the model itself."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import sparsefx
from sparsefx.errors import EmptyCalibration, NoGradient, NonFiniteStatistics
from sparsefx.prune.loss_gradients import BATCHES, LossIgnoresLayers, squared_gradients
from sparsefx.prune.measure import Data, error_table
from sparsefx.prune.weights import prunable_weights
from tests.hf_models import bert, ids, llama


def squares_by_hooks(
    model: nn.Module, batch: dict[str, Tensor], loss: Callable[[object], Tensor]
) -> dict[str, Tensor]:
    """Squared gradient at every output of every linear layer, [batch, length, out], by name."""
    found: dict[str, Tensor] = {}
    handles = []

    def watch(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            output.register_hook(lambda g: found.__setitem__(f"{name}.weight", g.square()))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(watch(name)))
    loss(model(**batch)).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return found


def test_a_language_models_loss_is_that_of_the_next_tokens_that_count() -> None:
    model = llama().model
    tokens, mask = ids(2, 24), torch.ones(2, 24, dtype=torch.long)
    mask[1, 15:] = 0
    batch = {"input_ids": tokens, "attention_mask": mask, "use_cache": False}

    def loss(output: object) -> Tensor:
        logits = output.logits[:, :-1]  # type: ignore[attr-defined]
        each = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        return (each * mask[:, 1:]).sum()

    weights = {n: w for n, w in prunable_weights(model).items() if n.startswith("model.layers.")}
    found = squared_gradients(model, [batch], weights)
    expected = squares_by_hooks(model, batch, loss)
    assert len(found) == 14 and found.keys() <= expected.keys()
    for name, mean in found.items():
        counted = expected[name][mask.bool()]
        torch.testing.assert_close(mean, counted.double().mean(0), rtol=1e-4, atol=1e-12)


def test_a_loss_of_the_models_own_is_taken() -> None:
    model = llama().model
    batch = {"input_ids": ids(1, 16), "labels": ids(1, 16), "use_cache": False}
    weights = {n: w for n, w in prunable_weights(model).items() if n.startswith("model.layers.1")}
    found = squared_gradients(model, [batch], weights)
    expected = squares_by_hooks(model, batch, lambda output: output.loss)  # type: ignore[attr-defined]
    for name, mean in found.items():
        counted = expected[name].flatten(0, 1).double().mean(0)
        torch.testing.assert_close(mean, counted, rtol=1e-4, atol=1e-14)


class Convolutions(nn.Module):
    """What is written in place, a convolution, and a head without activation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x), inplace=True)
        x = F.relu(self.second(x), inplace=True)
        y: Tensor = self.head(x.mean((2, 3)))
        return y


def test_any_other_model_is_judged_by_its_outputs() -> None:
    model = Convolutions().eval()
    batches = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    weights = prunable_weights(model)
    found = squared_gradients(model, batches, weights)
    torch.testing.assert_close(found["head.weight"], torch.ones(5, dtype=torch.float64))
    # Of the mean over 36 pixels of a channel, one pixel moves the outputs by a 36th of its column.
    most = model.head.weight.detach().double().square().sum(0) / 36**2
    assert (found["second.weight"] > 0).any() and found["first.weight"].shape == (8,)
    assert bool((found["second.weight"] < 9 * most).all())
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())


def test_the_error_of_the_last_layer_is_the_squared_change_of_the_outputs() -> None:
    model = Convolutions().eval()
    batches = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    weights = {"head.weight": prunable_weights(model)["head.weight"]}
    half = sparsefx.NM(2, 4)
    importance = squared_gradients(model, batches, weights)
    chosen = {"head.weight": half}
    data = Data(model, batches, progress=False)
    table = error_table(data, chosen, {"head.weight": (half, None)}, importance)
    with torch.no_grad():
        dense = torch.cat([model(x) for x in batches])
        pruned = sparsefx.sparsify(model, sparsefx.Recipe({"head.*": half}), progress=False)
        change = (dense - torch.cat([pruned(x) for x in batches])).square().sum() / 2 / len(dense)
    assert table["head.weight"] == [pytest.approx(float(change), rel=1e-4), 0]


def test_only_the_first_batches_are_read_and_the_model_stays() -> None:
    model = bert().model
    before = {name: each.clone() for name, each in model.state_dict().items()}
    reads = []

    def batches() -> object:
        for number in range(BATCHES + 5):
            reads.append(number)
            yield {"input_ids": ids(1, 8 + number % 2)}

    found = squared_gradients(model, batches(), prunable_weights(model))  # type: ignore[arg-type]
    assert len(reads) == BATCHES
    assert all(bool((mean > 0).any()) for mean in found.values())
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())


def test_a_layer_that_the_loss_ignores_has_no_gradient() -> None:
    class Ignoring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.ignored = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.ignored(x)
            y: Tensor = self.used(x)
            return y

    model = Ignoring().eval()
    with pytest.warns(LossIgnoresLayers, match=r"ignored\.weight"):
        found = squared_gradients(model, [torch.ones(2, 4)], prunable_weights(model))
    assert found["used.weight"].tolist() == [1] * 4 and found["ignored.weight"].tolist() == [0] * 4


def test_bad_data_are_named() -> None:
    model = Convolutions().eval()
    with pytest.raises(EmptyCalibration):
        squared_gradients(model, [], prunable_weights(model))
    with torch.no_grad():
        model.head.weight[0, 0] = torch.inf
    with pytest.raises(NonFiniteStatistics, match=r"gradients of the inputs of \w+\.weight"):
        squared_gradients(model, [torch.randn(2, 3, 8, 8)], prunable_weights(model))


class Scaled(nn.Module):
    """Two alike branches, of which one hardly counts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.loud, self.quiet = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.loud(x) + 0.01 * self.quiet(x)
        return y


@pytest.mark.parametrize(("objective", "differs"), [("loss", True), ("error", False)])
def test_a_knapsack_keeps_what_the_loss_depends_on(objective: str, differs: bool) -> None:
    levels = tuple(sparsefx.Unstructured(each / 10) for each in range(1, 10))
    recipe = sparsefx.Recipe(
        {"*": sparsefx.Unstructured(0.5)},
        allocation=sparsefx.Knapsack(levels, budget="parameters", objective=objective),
    )
    data = (x for x in torch.randn(6, 20, 32).unbind())  # which come once only
    pruned = sparsefx.sparsify(Scaled(), recipe, data, progress=False)
    layers = {each.name: each.reached for each in sparsefx.pruning_report(pruned).layers}
    gap = layers["quiet.weight"] - layers["loud.weight"]
    assert gap > 0.5 if differs else abs(gap) < 0.25


class Classes(Convolutions):
    """Gives numbers of classes, which have no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).argmax(1)


class Overwritten(Convolutions):
    """Writes over what the gradient of relu_ needs."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x), inplace=True)
        x[:, :4] = 0
        y: Tensor = self.head(self.second(x).mean((2, 3)))
        return y


@pytest.mark.parametrize("kind", [Classes, Overwritten])
def test_a_loss_without_gradient_is_named(kind: type[nn.Module]) -> None:
    x = torch.randn(2, 3, 8, 8)
    half = sparsefx.Unstructured(0.5)
    recipe = sparsefx.Recipe({"*": half}, allocation=sparsefx.Knapsack())
    with pytest.raises(NoGradient, match="objective="):
        sparsefx.sparsify(kind().eval(), recipe, [x], progress=False)


def test_gradients_are_found_in_inference_mode_too() -> None:
    model = Convolutions().eval()
    with torch.inference_mode():
        found = squared_gradients(model, [torch.ones(2, 3, 8, 8)], prunable_weights(model))
    torch.testing.assert_close(found["head.weight"], torch.ones(5, dtype=torch.float64))


def test_a_batch_by_position_is_the_same_batch() -> None:
    model = llama().model
    weights = {n: w for n, w in prunable_weights(model).items() if n.startswith("model.layers.")}
    by_name = squared_gradients(model, [{"input_ids": ids(1, 12)}], weights)
    by_place = squared_gradients(model, [(ids(1, 12),)], weights)
    for name, mean in by_name.items():
        assert torch.equal(mean, by_place[name])


def test_logits_that_predict_no_next_token_are_outputs_like_others() -> None:
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=64, num_labels=3,
    )  # fmt: skip
    for kind in (transformers.BertForTokenClassification, transformers.BertForMaskedLM):
        model = kind(config).eval()
        head = (
            "classifier.weight"
            if hasattr(model, "classifier")
            else "cls.predictions.decoder.weight"
        )
        weights = {head: prunable_weights(model)[head]}
        found = squared_gradients(model, [{"input_ids": ids(2, 9) % 64}], weights)
        if head.startswith("classifier"):
            torch.testing.assert_close(found[head], torch.ones_like(found[head]))
        assert bool((found[head] > 0).all())
