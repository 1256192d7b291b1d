"""A prunable weight as the budget sees it."""

from sparsefx.prune.allocation.layers import Layer
from sparsefx.prune.weights import PrunableWeight


def layer_of(weight: PrunableWeight, block: str) -> Layer:
    """Its name, block, dtype, and shape with the outputs first, whatever the stored order."""
    shape = weight.parameter.movedim(weight.axis, 1).shape
    return Layer(weight.name, block, tuple(shape), weight.parameter.dtype)
