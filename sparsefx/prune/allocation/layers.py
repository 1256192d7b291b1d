"""What an allocation knows of a layer, and shares of its weights that count out exactly."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparsefx.errors import InvalidAllocation


@dataclass(frozen=True)
class Layer:
    """One weight that takes part in a budget.

    name: its parameter name; block: the repeated block it belongs to, such as "model.layers.3";
    shape: (out, in) or, of a convolution, (out, in channels, *kernel), whatever the stored order;
    parts: how many weights of this shape it is, such as a layer's experts.
    """

    name: str
    block: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    parts: int = 1

    @property
    def numel(self) -> int:
        """Number of its weights, of all parts."""
        return self.parts * math.prod(self.shape)


def total(layers: Sequence[Layer]) -> int:
    """Number of weights of all layers."""
    return sum(layer.numel for layer in layers)


def check_sparsity(sparsity: float) -> None:
    """Raises InvalidAllocation for a sparsity outside [0, 1)."""
    if not 0 <= sparsity < 1:
        raise InvalidAllocation(
            what=f"sparsity {sparsity}",
            rule="the share of zeros over all layers must lie in [0, 1)",
            remedy="Half of the weights is 0.5, not 50",
        )


def share_of(drop: int, numel: int) -> float:
    """The sparsity at which patterns, which zero int(sparsity * numel) weights, zero `drop`."""
    share = drop / numel
    # 29 / 100 * 100 is 28.999...: the rounded quotient may lie below the exact one.
    return share if int(share * numel) == drop else math.nextafter(share, 1.0)
