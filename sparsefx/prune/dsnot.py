"""DSnoT (Zhang et al. 2023, arXiv 2310.08915): prune and grow until a row expects no error.

With mu and var of each input feature, c = W * mu, and a row's error eps = sum of c where pruned:

    grow    the pruned weight of largest c / var if eps > 0, of smallest if eps < 0
    prune   the kept weight of least Wanda score with c of the other sign than eps;
            N:M: the kept weight of least Wanda score in the group that grew
    eps +=  c[pruned] - c[grown]            until abs(eps) <= tolerance, or nothing is left to swap
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefx.calibrate.statistics import Moments
from sparsefx.criteria import DSnoT
from sparsefx.prune.wanda import wanda_scores


@dataclass
class _Queue:
    """Columns of each row in the order in which they may be taken, for eps < 0 and eps > 0.

    columns: [2, out, k]; length: [2, out], how many of them count; taken: [2, out].
    """

    columns: Tensor
    length: Tensor
    taken: Tensor

    @classmethod
    def of(cls, keys: Tensor, count: int) -> "_Queue":
        """Smallest keys [2, out, in] first, at most `count`; infinite ones do not count."""
        count = min(count, keys.shape[-1])
        columns = keys.topk(count, largest=False).indices
        length = keys.isfinite().sum(-1).clamp(max=count)
        return cls(columns, length, torch.zeros_like(length))

    def next(self, side: Tensor) -> tuple[Tensor, Tensor]:
        """The next column of each row [out] on its `side` (0, 1), and whether there is one."""
        rows = torch.arange(side.shape[0], device=side.device)
        at = self.taken[side, rows]
        self.taken[side, rows] += 1
        last = self.columns.shape[-1] - 1
        return self.columns[side, rows, at.clamp(max=last)], at < self.length[side, rows]


class _Groups:
    """N:M: which kept weight of a group is pruned when another of it grows; each at most once."""

    def __init__(self, scores: Tensor, keep: Tensor, size: int) -> None:
        self.scores = scores.masked_fill(~keep, torch.inf)
        self.size = size

    def next(self, grown: Tensor) -> tuple[Tensor, Tensor]:
        """For each row the column of least score in the group of `grown`, and if there is one."""
        first = grown // self.size * self.size
        columns = first[:, None] + torch.arange(self.size, device=grown.device)
        least, at = self.scores.gather(1, columns).min(1)
        pruned = first + at
        self.scores.scatter_(1, pruned[:, None], torch.inf)
        return pruned, least.isfinite()


class _Least:
    """The mask of each row at which its squared output error was least, along its swaps.

    With D = W where pruned, a swap that grows g and prunes p changes D (X^T X) D^T of its row by
    -2 W_g (D G)_g + 2 W_p (D G)_p + W_g^2 G_gg + W_p^2 G_pp - 2 W_g W_p G_gp.
    """

    def __init__(self, weight: Tensor, keep: Tensor, gram: Tensor) -> None:
        self.weight, self.gram, self.keep = weight, gram, keep.clone()
        self.lost = weight.masked_fill(keep, 0)
        self.error = torch.zeros_like(weight[:, 0])
        self.least = torch.zeros_like(self.error)

    def see(self, keep: Tensor, rows: Tensor, pruned: Tensor, grown: Tensor) -> None:
        """Takes note of one swap in each of `rows`, after which the mask is `keep`."""
        lost, p, g = self.lost[rows], self.weight[rows, pruned], self.weight[rows, grown]
        by_g, by_p = self.gram[grown], self.gram[pruned]
        linear = p * (lost * by_p).sum(1) - g * (lost * by_g).sum(1)
        places = torch.arange(len(rows), device=rows.device)
        own = g.square() * by_g[places, grown] + p.square() * by_p[places, pruned]
        self.error[rows] += 2 * (linear - g * p * by_g[places, pruned]) + own
        self.lost[rows, pruned], self.lost[rows, grown] = p, 0.0
        better = rows[self.error[rows] < self.least[rows]]
        self.least[better] = self.error[better]
        self.keep[better] = keep[better]


def swap(
    weight: Tensor, keep: Tensor, options: DSnoT, group: int, moments: Moments, gram: Tensor | None
) -> Tensor:
    """The refined mask, bool [out, in], with as many weights kept in each row as in `keep`.

    weight: dense, float32 [out, in]; keep: the mask to start from, not changed; group: m of N:M,
    whose groups keep their counts too, or 0; gram: None for the mask after the last swap, else
    X^T X [in, in], and each row gets that of least squared output error on the way. Only weights
    pruned by `keep` grow, each at most once, and only weights kept by it are pruned.
    """
    mean = (moments.sums / moments.count[1].clamp(min=1)).to(weight.dtype)
    change, scores = weight * mean, wanda_scores(weight, moments.norms)
    grow = _grow_queue(change, moments.variance, keep, options.cycles)
    prune: _Queue | _Groups = (
        _Groups(scores, keep, group)
        if group
        else _prune_queue(change, scores, keep, options.cycles)
    )
    least = None if gram is None else _Least(weight, keep, gram)
    error = change.masked_fill(keep, 0).sum(1)
    active = torch.ones_like(error, dtype=torch.bool)
    keep = keep.clone()
    for _ in range(options.cycles):
        active &= error.abs() > options.tolerance
        if not active.any():
            break
        side = (error > 0).long()
        grown, may_grow = grow.next(side)
        pruned, may_prune = prune.next(side) if isinstance(prune, _Queue) else prune.next(grown)
        active &= may_grow & (may_prune | bool(group))  # another group may yet have one to prune
        rows = (active & may_prune).nonzero().flatten()
        pruned, grown = pruned[rows], grown[rows]
        keep[rows, grown], keep[rows, pruned] = True, False
        error[rows] += change[rows, pruned] - change[rows, grown]
        if least is not None:
            least.see(keep, rows, pruned, grown)
    return keep if least is None else least.keep


def _grow_queue(change: Tensor, variance: Tensor, keep: Tensor, count: int) -> _Queue:
    """Pruned weights: side 0 the most negative c / var first, side 1 the most positive."""
    limits = torch.finfo(change.dtype)
    # Features that never vary divide by next to nothing: they grow first.
    gain = change / variance.to(change.dtype).clamp(min=limits.tiny)
    gain = gain.clamp(limits.min, limits.max)
    negative, positive = ~keep & (change < 0), ~keep & (change > 0)
    keys = torch.stack(
        [torch.where(negative, gain, torch.inf), torch.where(positive, -gain, torch.inf)]
    )
    return _Queue.of(keys, count)


def _prune_queue(change: Tensor, scores: Tensor, keep: Tensor, count: int) -> _Queue:
    """Kept weights of least score first: side 0, for eps < 0, those of c > 0, side 1 of c < 0."""
    negative, positive = keep & (change < 0), keep & (change > 0)
    keys = torch.stack(
        [scores.masked_fill(~positive, torch.inf), scores.masked_fill(~negative, torch.inf)]
    )
    return _Queue.of(keys, count)
