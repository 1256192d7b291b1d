"""What pruning does to a layer's output, from X^T X alone:  ||D X||^2 = sum of D (X^T X) D^T."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from sparsefx.calibrate.statistics import Gram, Sketch


def row_errors(difference: Tensor, gram: Tensor) -> Tensor:
    """Squared norm of each output's change over all calibration rows, float64 [out], at least 0.

    difference: W - W' [out, in] float32; gram: X^T X [in, in] float32.
    """
    return ((difference @ gram) * difference).sum(1, dtype=torch.float64).clamp(min=0)


def output_error(weight: Tensor, pruned: Tensor, inputs: Gram | Sketch) -> float:
    """||(W - W') X|| / ||W X|| in the Frobenius norm, weights [out, in]; 0 for W X = 0.

    From a gram, or estimated from a sketch of the layer's input.
    """
    return relative([energies(weight, pruned, inputs)])


def energies(weight: Tensor, pruned: Tensor, inputs: Gram | Sketch) -> tuple[float, float]:
    """||(W - W') X||^2 and ||W X||^2, as `output_error`."""
    dense = weight.detach().float()
    lost = _energy(dense - pruned.detach().float(), inputs)
    return float(lost), float(_energy(dense, inputs))


def relative(parts: Iterable[tuple[float, float]]) -> float:
    """The `output_error` of a weight from the `energies` of its parts."""
    lost, whole = (sum(column) for column in zip(*parts, strict=True))
    return math.sqrt(lost / whole) if whole > 0 else 0.0


def _energy(matrix: Tensor, inputs: Gram | Sketch) -> Tensor:
    if isinstance(inputs, Gram):
        return row_errors(matrix, inputs.gram).sum()
    return (matrix @ inputs.sums.T).square().sum(dtype=torch.float64)
