"""reestimate_batch_norm(): statistics are those of the data, and nothing else changes."""

import copy

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.errors import (
    EmptyCalibration,
    NonFiniteActivation,
    ShapeMismatch,
    TooFewValues,
    UnknownOption,
)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Conv2d(8, 4, 1)
    )


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 3, 9, 9, generator=generator) * scale for scale in (1.0, 2.0)]


def test_statistics_are_the_mean_over_the_batches() -> None:
    model = net().train()
    frozen = copy.deepcopy(model)
    assert sparsefx.reestimate_batch_norm(model, images()) == 1
    outputs = [frozen[0](batch).detach().double() for batch in images()]
    means = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
    variances = torch.stack([y.transpose(0, 1).flatten(1).var(1) for y in outputs]).mean(0)
    torch.testing.assert_close(model[1].running_mean.double(), means, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model[1].running_var.double(), variances, atol=1e-5, rtol=1e-5)
    assert all(module.training for module in model.modules()) and model[1].momentum == 0.1
    for mine, other in zip(model.parameters(), frozen.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_pruned_convolution_is_normalised_again() -> None:
    model = net()
    x = images()[:1]
    sparsefx.reestimate_batch_norm(model, x)
    recipe = sparsefx.Recipe({"0.weight": sparsefx.Unstructured(0.7)})
    pruned = sparsefx.sparsify(model.eval(), recipe, progress=False)
    spread = [pruned[:2](x[0]).std((0, 2, 3)).detach()]
    sparsefx.reestimate_batch_norm(pruned, x)
    spread.append(pruned[:2](x[0]).std((0, 2, 3)).detach())
    assert (spread[0] - 1).abs().max() > 0.05  # pruning has shrunk what the norm sees
    torch.testing.assert_close(spread[1], torch.ones(8), atol=1e-3, rtol=0)


def test_beside_the_dense_model_only_what_pruning_did_is_changed() -> None:
    dense = net()
    learned = {"mean": torch.linspace(-1, 1, 8), "var": torch.linspace(0.5, 3, 8)}
    dense[1].running_mean.copy_(learned["mean"])
    dense[1].running_var.copy_(learned["var"])
    pruned, few = copy.deepcopy(dense), [images()[0][:2]]
    assert sparsefx.reestimate_batch_norm(pruned, few, dense) == 1
    torch.testing.assert_close(pruned[1].running_mean, learned["mean"])  # nothing was pruned
    torch.testing.assert_close(pruned[1].running_var, learned["var"])
    with torch.no_grad():
        pruned[0].weight.mul_(0.5)
        pruned[0].bias.copy_(0.5 * dense[0].bias + 1)
    before = copy.deepcopy(dense.state_dict())
    sparsefx.reestimate_batch_norm(pruned, iter(few), dense)
    torch.testing.assert_close(pruned[1].running_var, learned["var"] / 4)
    # Outputs are halved, then one is added: so are the outputs that were learned from.
    torch.testing.assert_close(pruned[1].running_mean, learned["mean"] / 2 + 1)
    assert all(torch.equal(before[name], now) for name, now in dense.state_dict().items())


def test_a_dense_model_of_another_kind_is_refused() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ShapeMismatch, match="dense"):
        sparsefx.reestimate_batch_norm(model, images(), nn.Sequential(nn.BatchNorm2d(5)))
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


@pytest.mark.parametrize("case", ["empty", "nan"])
def test_failures_leave_the_norms_alone(case: str) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    batches = [] if case == "empty" else [images()[0], torch.full((2, 3, 9, 9), torch.nan)]
    with pytest.raises(EmptyCalibration if case == "empty" else NonFiniteActivation):
        sparsefx.reestimate_batch_norm(model, batches)
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    assert model[1].momentum == 0.1


def test_channels_that_pruning_silenced_stay_silent() -> None:
    """What is left of the learned mean there would be divided by the root of eps."""
    dense = net()[:2].train()
    for _ in range(60):
        dense(torch.randn(16, 3, 9, 9) + 0.3)
    dense.eval()
    recipe = sparsefx.Recipe({"0.weight": sparsefx.Rows(0.5)})
    pruned = sparsefx.sparsify(dense, recipe, progress=False)
    sparsefx.reestimate_batch_norm(pruned, [images()[0][:2]], dense)
    dead = (pruned[0].weight == 0).flatten(1).all(1)
    assert int(dead.sum()) == 4
    x = torch.randn(8, 3, 9, 9) + 0.3
    before, after = (each(x).detach() for each in (dense, pruned))
    assert after[:, dead].abs().max() < 1e-2
    torch.testing.assert_close(after[:, ~dead], before[:, ~dead], atol=1e-4, rtol=1e-4)


class Auxiliary(nn.Module):
    """A second norm that only training runs."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.extra = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        return self.extra(y) if self.training else y


@pytest.mark.parametrize("beside", [True, False])
def test_a_norm_that_no_batch_runs_keeps_what_it_learned(beside: bool) -> None:
    model = Auxiliary().train()
    model(images()[0])
    learned = {name: each.clone() for name, each in model.extra.named_buffers()}
    dense = copy.deepcopy(model) if beside else None
    assert sparsefx.reestimate_batch_norm(model, images(), dense) == 1
    for name, now in model.extra.named_buffers():
        assert torch.equal(now, learned[name])
    assert int(model.norm.num_batches_tracked) == (1 if beside else 2)


@pytest.mark.parametrize("size", [0, 1])
def test_one_value_for_each_channel_is_no_variance(size: int) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TooFewValues, match=rf"norm 1 sees {size} value.* batch 1 "):
        sparsefx.reestimate_batch_norm(model, [torch.randn(3, 4), torch.randn(size, 4)])
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())
    assert sparsefx.reestimate_batch_norm(model, [torch.randn(3, 4)]) == 1  # no hook is left


@pytest.mark.parametrize(
    ("option", "model", "batches", "dense"),
    [
        ("batches", net(), images()[0], None),
        ("batches", net(), None, None),
        ("batches", net(), {"x": images()[0]}, None),
        ("dense", net(), images(), "net"),
        ("model", "net", images(), None),
    ],
)
def test_what_is_no_model_or_no_batches_is_refused(
    option: str, model: nn.Module, batches: list[Tensor], dense: nn.Module | None
) -> None:
    with pytest.raises(UnknownOption, match=f"{option}="):
        sparsefx.reestimate_batch_norm(model, batches, dense)
