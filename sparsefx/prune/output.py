"""What pruning does to a layer's output, from X^T X alone:  ||D X||^2 = sum of D (X^T X) D^T."""

import torch
from torch import Tensor


def row_errors(difference: Tensor, gram: Tensor) -> Tensor:
    """Squared norm of each output's change over all calibration rows, float64 [out], at least 0.

    difference: W - W' [out, in] float32; gram: X^T X [in, in] float32.
    """
    return ((difference @ gram) * difference).sum(1, dtype=torch.float64).clamp(min=0)


def output_error(weight: Tensor, pruned: Tensor, gram: Tensor) -> float:
    """||(W - W') X|| / ||W X|| in the Frobenius norm, from gram = X^T X [in, in]; 0 for W X = 0."""
    dense = weight.detach().float()
    lost = row_errors(dense - pruned.detach().float(), gram).sum()
    whole = row_errors(dense, gram).sum()
    return float((lost / whole).sqrt()) if whole > 0 else 0.0
