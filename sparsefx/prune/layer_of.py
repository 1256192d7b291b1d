"""A prunable weight as the budget sees it."""

from sparsefx.prune.allocation.layers import Layer
from sparsefx.prune.weights import PrunableWeight


def layer_of(weight: PrunableWeight, block: str) -> Layer:
    """Its name, block, dtype, and shape with the outputs first, whatever the stored order.

    Of a stack of experts, the shape of one; groups of a convolution are one layer.
    """
    dtype = weight.parameter.dtype
    if weight.is_stack:
        return Layer(weight.name, block, tuple(weight.fit_shape), dtype, weight.parts)
    shape = weight.parameter.movedim(weight.axis, 1).shape
    return Layer(weight.name, block, tuple(shape), dtype)
