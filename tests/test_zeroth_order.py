"""Zeroth-order scores are the slope of the loss along the noise, and leave the model as it was."""

import math

import pytest
import torch
from torch import Tensor

from sparsefx.allocations import ZerothOrder
from sparsefx.errors import EmptyCalibration, NonFiniteLoss
from sparsefx.prune.allocation.zeroth_order import zeroth_order_scores


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Counted:
    """A loss linear in each tensor, sum_t <slope_t, W_t> * (1 + batch), that keeps its calls."""

    def __init__(self, model: dict[str, Tensor]) -> None:
        self.model = model
        self.slopes = {
            name: random(*w.shape, seed=9 + i) for i, (name, w) in enumerate(model.items())
        }
        self.batches: list[int] = []

    def __call__(self, batch: int) -> float:
        self.batches.append(batch)
        terms = (w.double() * self.slopes[name].double() for name, w in self.model.items())
        return (1 + batch) * math.fsum(float(term.sum()) for term in terms)


def small_model(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {"a": random(6, 4).to(dtype), "b": random(3, 4, seed=1).to(dtype)}


def test_a_linear_loss_gives_the_mean_of_its_slope_along_the_noise() -> None:
    """E |z . g| = sqrt(2 / pi) |g|; 400 draws are within 4 standard errors of it."""
    model = small_model()
    loss = Counted(model)
    found = zeroth_order_scores(model, loss, 1, ZerothOrder(samples=400))
    assert loss.batches == [0] * 2 * 400 * 2
    for name, value in found.items():
        norm = float(loss.slopes[name].norm())
        error = 4 * norm * math.sqrt((1 - 2 / math.pi) / 400)
        assert value == pytest.approx(math.sqrt(2 / math.pi) * norm, abs=error)


def test_scores_weigh_by_the_tensors_own_size() -> None:
    model = small_model()
    plain = zeroth_order_scores(model, Counted(model), 1, ZerothOrder())
    for score, power in (("magnitude", 1), ("square", 2)):
        weighed = zeroth_order_scores(model, Counted(model), 1, ZerothOrder(score=score))
        for name, weight in model.items():
            size = float(weight.abs().pow(power).mean())
            assert weighed[name] == pytest.approx(size * plain[name] ** power, rel=1e-6)


def test_draws_walk_through_the_batches_and_tensors_report_themselves() -> None:
    model, told = small_model(), list[str]()
    loss = Counted(model)
    zeroth_order_scores(model, loss, 3, ZerothOrder(samples=4), told.append)
    assert loss.batches == [0, 0, 1, 1, 2, 2, 0, 0] * 2
    assert told == ["a", "b"]


def test_noise_depends_on_the_name_and_the_seed_alone() -> None:
    model = small_model()
    both = zeroth_order_scores(model, Counted(model), 2, ZerothOrder())
    torch.manual_seed(123)
    alone = zeroth_order_scores({"b": model["b"]}, Counted(model), 2, ZerothOrder())
    assert alone["b"] == both["b"]
    other = zeroth_order_scores(model, Counted(model), 2, ZerothOrder(seed=1))
    assert other["b"] != both["b"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    model = small_model(dtype)
    model["a"][0, :2] = torch.tensor([-0.0, 3e4], dtype=dtype)
    before = {name: weight.clone().view(torch.uint8) for name, weight in model.items()}
    seen: list[Tensor] = []
    plain = Counted(model)

    def loss(batch: int) -> float:
        seen.append(model["a"].clone())
        return plain(batch)

    zeroth_order_scores(model, loss, 2, ZerothOrder(epsilon=0.1))
    assert not torch.equal(seen[0], seen[1])  # it was indeed moved
    for name, weight in model.items():
        assert torch.equal(weight.view(torch.uint8), before[name])


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_named_and_nothing_is_changed(loss: float) -> None:
    model = small_model()
    before = model["a"].clone()
    with pytest.raises(NonFiniteLoss, match=rf"{loss} on batch 0 with a perturbed by 0.001"):
        zeroth_order_scores(model, lambda batch: loss, 2, ZerothOrder())
    assert torch.equal(model["a"], before)


def test_no_batches_are_refused() -> None:
    with pytest.raises(EmptyCalibration):
        zeroth_order_scores(small_model(), lambda batch: 0.0, 0, ZerothOrder())
