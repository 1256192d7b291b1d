"""A user's metric of a model (lower is better), dense and pruned."""

import math

import torch
from torch import nn

from sparsefx.attention.spec import Metric
from sparsefx.calibrate import together
from sparsefx.entry import inferring
from sparsefx.errors import NonFiniteMetric


def value_of(metric: Metric, model: nn.Module) -> float:
    """The metric in eval mode and without gradients; NaN, which no bound holds, is infinite.

    In distributed runs, where all processes must ask together, the first one's value.
    """
    with together.all_or_none("evaluating the metric"), inferring(model), torch.no_grad():
        value = float(metric(model))
    return float(str(together.share_json(math.inf if math.isnan(value) else value)))


def dense_value_of(metric: Metric, model: nn.Module) -> float:
    """The metric of the model as it is. Raises NonFiniteMetric."""
    value = value_of(metric, model)
    if not math.isfinite(value):
        raise NonFiniteMetric(model=type(model).__name__, value=value)
    return value


def worst_allowed(dense: float, drop: float) -> float:
    """The largest value that is worse than `dense` by at most the share `drop` of its size."""
    return dense + drop * abs(dense)
