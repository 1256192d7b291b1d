"""Wanda (Sun et al. 2023, arXiv 2306.11695):  score[i, j] = |W[i, j]| * ||X[:, j]||_2."""

from torch import Tensor

from sparsefx.patterns import Pattern, Unstructured, keep_highest


def wanda_scores(weight: Tensor, norms: Tensor) -> Tensor:
    """Importance of each weight, float32 [out, in]; norms: of each input feature, float64 [in]."""
    # Scores are compared, so that one factor for all features, which saves overflow, is free.
    largest = norms.max().clamp(min=1e-300)
    return weight.abs() * (norms / largest).to(weight.dtype)


def keep_by_row(scores: Tensor, pattern: Pattern) -> Tensor:
    """Bool [out, in]: as `pattern.keep`, but unstructured compares within each output row.

    Each row then loses exactly int(in * sparsity) weights; ties go to the lower index.
    """
    if isinstance(pattern, Unstructured):
        width = scores.shape[1]
        return keep_highest(scores, width - int(width * pattern.sparsity))
    return pattern.keep(scores)
