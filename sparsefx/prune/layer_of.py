"""A prunable weight as the budget sees it: its shape, and the repeated block that it belongs to."""

from collections.abc import Mapping

from sparsefx.calibrate.blocks import block_of, repeated_blocks
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


def blocks_of(weights: Mapping[str, PrunableWeight]) -> dict[str, str]:
    """The repeated block of each weight by name, "" for those in none."""
    blocks = repeated_blocks({name: each.parameter.numel() for name, each in weights.items()})
    return {name: block_of(name, blocks) or "" for name in weights}
