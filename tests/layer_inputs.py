"""Inputs of a layer as trained models have them: correlated, of uneven scale, with a mean."""

import torch
from torch import Tensor

from sparsefx.calibrate.statistics import STATISTICS, Statistic


def correlated(rows: int, features: int, seed: int = 0) -> Tensor:
    """Float32 [rows, features]; few directions carry most of it."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(rows, max(1, features // 4), generator=generator)
    mixed = shared @ torch.randn(shared.shape[1], features, generator=generator)
    own = torch.randn(rows, features, generator=generator)
    scale = torch.exp(0.8 * torch.randn(features, generator=generator))
    mean = 0.5 * torch.randn(features, generator=generator)
    return (mixed * 0.5 + own + mean) * scale


def weight_of(out: int, features: int, seed: int = 1) -> Tensor:
    """Float32 [out, features], normal."""
    return torch.randn(out, features, generator=torch.Generator().manual_seed(seed))


def observed(x: Tensor, *names: str, samples: int = 4) -> dict[str, Statistic]:
    """The statistics called `names` of the rows x [n, features]; of no name, of all of them."""
    found = {}
    for name in names or tuple(STATISTICS):
        found[name] = STATISTICS[name](x.shape[1], x.device)
        found[name].add(x, samples)
    return found


def squared_errors(x: Tensor, weight: Tensor, pruned: Tensor) -> Tensor:
    """||(W - W') X||^2 of each row of the weight, float64 [out], from the inputs themselves."""
    return ((weight.double() - pruned.double()) @ x.double().T).square().sum(1)
