"""SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774): prune a column, mend it in later ones.

With H = X^T X + damping and U upper triangular, U^T U = H^-1, column by column, left to right:

    e = W[:, j] / U[j, j] where pruned, else 0         W[:, j:] -= e U[j, j:]

which sets the pruned weights to 0 and moves the later columns to where the squared output error
is least. Rounding a kept weight to a code is the same step with e = (W[:, j] - code) / U[j, j]
(GPTQ, arXiv 2210.17323). Weights of least W[i, j]^2 / U[j, j]^2, the error each adds, are pruned.
Everything here is held transposed, so that a column of W is contiguous.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sparsefx.criteria import SparseGPT
from sparsefx.errors import SingularHessian
from sparsefx.patterns import NM, Pattern, Unstructured, keep_highest
from sparsefx.prune.rounding import Grid

_PANEL = 32  # columns eliminated one by one before a matrix product carries them on
_ATTEMPTS = 4  # each with ten times the damping


class _Steps(NamedTuple):
    """Columns to a block, after which all later ones are updated, to a choice, and to a panel."""

    block: int
    choice: int
    panel: int


def prune_and_update(
    weight: Tensor, pattern: Pattern, gram: Tensor, options: SparseGPT
) -> tuple[Tensor, Tensor]:
    """The pruned and updated weight, float32, and its mask, bool, both [out, in].

    weight: float32 [out, in], not changed; gram: X^T X, float32 [in, in]. N:M groups are ranked
    when their first column is reached, by the weights of that moment; unstructured weights block
    by block; blocks, rows and columns once, by the weights as given. Columns whose input is
    always 0 become 0. Raises SingularHessian.
    """
    factor = inverse_factor(gram, options.damp)
    columns = _live_columns(weight, gram)
    keep = torch.ones_like(columns, dtype=torch.bool)
    diagonal = factor.diagonal()[:, None]
    steps = _Steps(options.block, options.block, _PANEL)
    match pattern:
        case Unstructured(sparsity=sparsity):
            _sweep(columns, factor, keep, steps, _lowest_share(columns, diagonal, sparsity))
        case NM(n=n, m=m):
            # A group must not straddle two blocks.
            steps = _Steps(max(m, options.block // m * m), m, m)
            _sweep(columns, factor, keep, steps, _lowest_of_groups(columns, diagonal, n))
        case _:
            keep = pattern.keep((columns / diagonal).square().T).T.contiguous()
            _sweep(columns, factor, keep, steps)
    return columns.T.contiguous(), keep.T.contiguous()


def update(
    weight: Tensor, keep: Tensor, gram: Tensor, options: SparseGPT, grid: Grid | None = None
) -> Tensor:
    """The weight, float32 [out, in], pruned to a mask `keep` that is given and updated for it.

    grid: what kept weights are rounded to.
    """
    columns = _live_columns(weight, gram)
    factor = inverse_factor(gram, options.damp)
    steps = _Steps(options.block, options.block, _PANEL)
    _sweep(columns, factor, keep.T.contiguous(), steps, grid=grid)
    return columns.T.contiguous()


def inverse_factor(gram: Tensor, damp: float) -> Tensor:
    """U, upper triangular float32 [in, in], with U^T U = (H + damp * I)^-1 for H scaled to mean 1.

    H is gram / (mean of its diagonal), with 1 for features that are always 0. Damping grows
    tenfold where no factor is found, in float32 and then in float64. Raises SingularHessian.
    """
    scale = gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
    # H = R R^T with R upper: the Cholesky factor of H with both its axes reversed. U is R^-1.
    hessian = (gram / scale).flip(0, 1)
    hessian.diagonal().masked_fill_(hessian.diagonal() == 0, 1)
    for attempt in range(_ATTEMPTS):
        for dtype in (torch.float32, torch.float64):
            damped = hessian.to(dtype, copy=True)
            damped.diagonal().add_(damp * 10**attempt)
            lower, failed = torch.linalg.cholesky_ex(damped)
            if failed == 0:
                factor = _inverse(lower.flip(0, 1)).float()
                if factor.isfinite().all():
                    return factor
    raise SingularHessian(name="a layer", damp=damp * 10 ** (_ATTEMPTS - 1))


def _inverse(upper: Tensor) -> Tensor:
    """Inverse of an upper triangular matrix; half the work of solving for the identity."""
    size = upper.shape[0]
    inverse = torch.zeros_like(upper)
    if size <= 128:
        inverse.fill_diagonal_(1)
        torch.linalg.solve_triangular(upper, inverse, upper=True, out=inverse)
        return inverse
    half = size // 2
    inverse[:half, :half] = _inverse(upper[:half, :half])
    inverse[half:, half:] = _inverse(upper[half:, half:])
    corner = inverse[:half, :half] @ upper[:half, half:] @ inverse[half:, half:]
    inverse[:half, half:] = corner.neg_()
    return inverse


def _live_columns(weight: Tensor, gram: Tensor) -> Tensor:
    """A copy of the weight as [in, out], with 0 where the input is always 0."""
    columns = weight.T.clone(memory_format=torch.contiguous_format)
    return columns.masked_fill_((gram.diagonal() == 0)[:, None], 0)


Choose = Callable[[int, int], Tensor]
"""(start, stop) -> keep [stop - start, out] of these columns, by the weights as they are now."""


def _lowest_share(columns: Tensor, diagonal: Tensor, sparsity: float) -> Choose:
    out = columns.shape[1]

    def choose(start: int, stop: int) -> Tensor:
        # Differences of running totals: no rounding adds up over the blocks.
        drop = int(sparsity * out * stop) - int(sparsity * out * start)
        scores = (columns[start:stop] / diagonal[start:stop]).square_()
        return keep_highest(scores.flatten(), scores.numel() - drop).view(scores.shape)

    return choose


def _lowest_of_groups(columns: Tensor, diagonal: Tensor, n: int) -> Choose:
    def choose(start: int, stop: int) -> Tensor:
        scores = (columns[start:stop] / diagonal[start:stop]).square_()
        return keep_highest(scores.T, n).T

    return choose


def _sweep(
    columns: Tensor,
    factor: Tensor,
    keep: Tensor,
    steps: _Steps,
    choose: Choose | None = None,
    grid: Grid | None = None,
) -> None:
    """One pass over `columns` [in, out], in place; fills in `keep` [in, out] where `choose` says.

    factor: U. Without `choose`, `keep` is given. grid: what kept weights are rounded to.
    """
    width, out = columns.shape
    errors = columns.new_empty(min(steps.block, width), out)
    for start in range(0, width, steps.block):
        stop = min(start + steps.block, width)
        for at in range(start, stop, steps.panel):
            end = min(at + steps.panel, stop)
            if choose is not None and (at - start) % steps.choice == 0:
                until = min(at + steps.choice, stop)
                keep[at:until] = choose(at, until)
            panel_errors = errors[at - start : end - start]
            own = (columns[at:end], factor[at:end, at:end], keep[at:end], panel_errors)
            if grid is None:
                _eliminate(*own)
            else:
                _round(*own, grid, at)
            columns[end:stop].addmm_(factor[at:end, end:stop].T, panel_errors, alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors[: stop - start], alpha=-1)


def _eliminate(columns: Tensor, factor: Tensor, keep: Tensor, errors: Tensor) -> None:
    """Sets the pruned weights of a panel [k, out] to 0 and mends its later columns.

    errors [k, out]: filled with what each column's pruning leaves to the columns behind the panel.
    """
    scale = (~keep) / factor.diagonal()[:, None]
    for j in range(columns.shape[0]):
        torch.mul(columns[j], scale[j], out=errors[j])
        columns[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
    columns.masked_fill_(~keep, 0)


def _round(
    columns: Tensor, factor: Tensor, keep: Tensor, errors: Tensor, grid: Grid, first: int
) -> None:
    """As `_eliminate`, and rounds the kept weights of a panel that starts at column `first`."""
    for j in range(columns.shape[0]):
        codes = grid.nearest(columns[j], first + j).masked_fill_(~keep[j], 0)
        torch.div(columns[j] - codes, factor[j, j], out=errors[j])
        columns[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1)
        columns[j] = codes
