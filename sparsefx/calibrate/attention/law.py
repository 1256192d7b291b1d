"""factor = a * exp(b * sparsity): how the scale factor grows with the sparsity it gives.

Fitted in log space, ln factor = ln a + b * sparsity, an ordinary line. Factors span decades, and
least squares in linear space, the paper's other choice, sees the largest few only: on a window of
SmolLM2 the factor of the line meets sparsities of 0.2, 0.5 and 0.7 to 0.04 in either order, that of
the linear fit misses 0.2 by 0.08 (sink_diagonal) and 0.12 (ascending).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOWEST, HIGHEST, FEWEST = 0.10, 0.90, 3


@dataclass(frozen=True)
class Law:
    """a and b of the law, and R^2 of ln factor (1 is perfect)."""

    a: float
    b: float
    r2: float

    def factor(self, sparsity: float) -> float:
        """The scale factor that gives `sparsity`."""
        return self.a * math.exp(self.b * sparsity)


def fit(factors: Tensor, sparsity: Tensor) -> Law | None:
    """The law through points (factor, sparsity), both [points]; None if fewer than 3 are usable.

    Usable is 0.10 <= sparsity <= 0.90: outside it the curve bends (Model-Optimizer's calibrator).
    """
    usable = (sparsity >= LOWEST) & (sparsity <= HIGHEST) & (factors > 0)
    x, y = sparsity[usable].double(), factors[usable].double().log()
    if x.numel() < FEWEST or float(x.max() - x.min()) == 0:
        return None
    dx, dy = x - x.mean(), y - y.mean()
    slope = (dx @ dy) / (dx @ dx)
    residual = dy - slope * dx
    spread = float(dy @ dy)
    r2 = 1 - float(residual @ residual) / spread if spread else 1.0
    return Law(math.exp(float(y.mean() - slope * x.mean())), float(slope), r2)


def at_factor(factors: Tensor, table: Tensor, wanted: Tensor) -> Tensor:
    """table[h] between its trials, linear in ln factor: [heads, trials] at [heads] -> [heads].

    Below the first trial it falls to 0 with the factor; above the last it stays.
    """
    known = torch.cat((factors.new_zeros(1), factors)).double()
    values = torch.cat((table.new_zeros(table.shape[0], 1), table), 1)
    upper = torch.searchsorted(known, wanted.double()).clamp(1, known.numel() - 1)
    lower = upper - 1
    low, high = known[lower], known[upper]
    log_share = (wanted.double() / low).log() / (high / low).log()
    share = torch.where(low > 0, log_share, wanted.double() / high).clamp(0, 1)
    share = torch.where(wanted.double() >= high, 1.0, share)
    first, last = values.gather(1, lower[:, None]), values.gather(1, upper[:, None])
    return (first + share[:, None] * (last - first))[:, 0]
