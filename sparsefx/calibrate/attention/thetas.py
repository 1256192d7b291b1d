"""Top-Theta thresholds of every head and row length, and what they keep (arXiv 2502.08363).

The threshold of a row is its (k + 1)-th largest score, so that exactly k are above it. Rows are
gathered by length, eight lengths an octave. While calibrating, each row keeps its exact top k, so
that later layers are calibrated on what they will see.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsefx.attention.interpolate import at_lengths
from sparsefx.attention.meaning import shaped
from sparsefx.attention.spec import Theta
from sparsefx.attention.thresholds import ThetaThresholds
from sparsefx.calibrate.attention.tiles import Band, Call, wide

PER_OCTAVE = 8
BAND = (64, 64)
_NEVER = float("-inf")
COUNT, LENGTH, THETA, SQUARE, LOST = range(5)


@dataclass(frozen=True)
class Rows:
    """A band's scores x as a softmax: top, its largest; weight e^(x - top); total, their sum.

    x, weight, visible [group, rows, keys]; top, total, and count, the visible keys, [group, rows,
    1].
    """

    x: Tensor
    visible: Tensor
    top: Tensor
    weight: Tensor
    total: Tensor
    count: Tensor
    v: Tensor

    @classmethod
    def of(cls, band: Band) -> "Rows":
        """The softmax of a band."""
        x = band.scores.flatten(-2)
        visible = x != _NEVER
        top = x.amax(-1, keepdim=True)
        weight = (x - top.masked_fill(top == _NEVER, 0)).exp()
        total, count = weight.sum(-1, keepdim=True), visible.sum(-1, keepdim=True)
        return cls(x, visible, top, weight, total, count, band.v.flatten(0, 1))

    def dense(self) -> Tensor:
        """The attention's own result, [group, rows, dim]."""
        return self.weight @ self.v / _nonzero(self.total)

    def thresholded(self, spec: Theta, keep: Tensor, limit: Tensor, missing: Tensor) -> Tensor:
        """The result over `keep`; limit: of x; missing: what stands for the rest if "offline"."""
        kept = self.weight * keep
        rest = self.total - kept.sum(-1, keepdim=True)
        if spec.placement == "pre" and spec.denominator != "exact":
            dropped = self.count - keep.sum(-1, keepdim=True)
            each = (limit - self.top).clamp(max=0).exp()
            stand_in = {"none": 0 * rest, "offline": missing, "exp_threshold": dropped * each}
            rest = torch.where(dropped > 0, stand_in[spec.denominator], 0)
        p = kept / _nonzero(kept.sum(-1, keepdim=True) + rest)
        result = p @ self.v
        if spec.v_mean:
            mean = self.visible.to(p.dtype) @ self.v / self.count.clamp(min=1)
            result = result + (1 - p.sum(-1, keepdim=True)) * mean
        return result


@dataclass
class ThetaStatistics:
    """Sums over the calibration rows of one attention that are longer than k.

    spec: with the k of this layer. keys: fewest and most keys of a call. table: float64 [5, heads,
    lengths], the number of rows, and the sums of their length, threshold, its square, and dropped
    e^(x - max); a row of n keys belongs to length round(8 log2(n / k)). measured: float64 [4],
    elements kept and visible, squared error and squared norm of the output under the thresholds.
    """

    spec: Theta
    keys: tuple[int, int]
    table: Tensor
    measured: Tensor

    @classmethod
    def empty(cls, spec: Theta, heads: int) -> "ThetaStatistics":
        """No data yet."""
        table = torch.zeros((5, heads, 1), dtype=torch.float64)
        return cls(spec, (0, 0), table, torch.zeros(4, dtype=torch.float64))

    def add(self, call: Call) -> Tensor:
        """Adds one call; returns its result over each row's exact top k."""
        self.keys = (min(self.keys[0] or call.keys, call.keys), max(self.keys[1], call.keys))
        self.measured = self.measured.to(call.q.device)
        self._reach(call)
        return _result(call, self._calibrated)

    def measure(self, call: Call) -> Tensor:
        """Adds what the thresholds keep and change in one call; returns its result under them."""
        found = self.thresholds()
        device = call.q.device
        lengths = torch.tensor(found.lengths, device=device)
        theta = torch.tensor(found.theta, device=device)
        lost = torch.tensor(found.lost, device=device) if found.lost else torch.zeros_like(theta)

        def under_thresholds(band: Band) -> Tensor:
            rows, heads = Rows.of(band), band.heads
            limit = at_lengths(lengths, theta[heads], rows.count[..., 0])[..., None].to(rows.x)
            if self.spec.placement == "post":
                limit = rows.top + (limit.clamp(min=0) * rows.total).log()
            missing = at_lengths(lengths, lost[heads], rows.count[..., 0])[..., None].to(rows.x)
            return self._measured(rows, limit, missing)

        return _result(call, under_thresholds)

    def tensors(self) -> dict[str, Tensor]:
        """What `load` takes, by name."""
        return {"table": self.table}

    def load(self, keys: tuple[int, int], tensors: Mapping[str, Tensor]) -> None:
        """Takes up what `tensors` gave."""
        self.keys, self.table = keys, tensors["table"]

    def thresholds(self) -> ThetaThresholds:
        """What was found so far."""
        spec, table = self.spec, self.table.cpu()
        known = (table[COUNT] > 0).all(0)
        table = table[..., known]
        if not table.numel():  # no row is longer than k: every element passes
            lengths: tuple[int, ...] = (spec.k,)
            theta = torch.full((table.shape[1], 1), torch.finfo(torch.float32).min)
            lost = torch.zeros_like(theta)
        else:
            mean = table / table[COUNT]
            lengths = tuple(mean[LENGTH, 0].round().long().tolist())
            spread = (mean[SQUARE] - mean[THETA].square()).clamp(min=0).sqrt()
            theta, lost = mean[THETA] + spec.deviations * spread, mean[LOST]
        kept, visible, error, norm = self.measured.tolist()
        return ThetaThresholds(
            k=spec.k,
            lengths=lengths,
            theta=_rows(theta),
            lost=_rows(lost) if spec.denominator == "offline" else (),
            placement=spec.placement,
            denominator=spec.denominator,
            v_mean=spec.v_mean,
            keys=self.keys,
            kept=kept / visible if visible else None,
            error=(error / norm) ** 0.5 if norm else None,
        )

    def _calibrated(self, band: Band) -> Tensor:
        rows, k = Rows.of(band), self.spec.k
        long = rows.count > k
        if not bool(long.any()):
            return rows.dense()
        limit = rows.x.topk(k + 1, -1).values[..., k:]
        keep = rows.visible & ((rows.x > limit) | ~long)
        rest = rows.total - (rows.weight * keep).sum(-1, keepdim=True)
        theta = limit
        if self.spec.placement == "post":
            theta = (limit - rows.top).exp() / _nonzero(rows.total)
        self._count(band.heads, long[..., 0], rows.count[..., 0], theta[..., 0], rest[..., 0])
        return rows.thresholded(self.spec, keep, limit, rest)

    def _count(
        self, heads: slice, long: Tensor, count: Tensor, theta: Tensor, rest: Tensor
    ) -> None:
        """Adds rows [group, rows]: their length, threshold and dropped weight."""
        point = self._point(count.clamp(min=self.spec.k))
        theta, rest = theta.double().masked_fill(~long, 0), rest.double()
        length = count.double()
        sums = torch.stack((torch.ones_like(theta), length, theta, theta.square(), rest)) * long
        self.table[:, heads].scatter_add_(2, point.expand_as(sums), sums)

    def _measured(self, rows: Rows, limit: Tensor, missing: Tensor) -> Tensor:
        long = rows.count > self.spec.k
        keep = rows.visible & ((rows.x > limit) | ~long)
        result, dense = rows.thresholded(self.spec, keep, limit, missing), rows.dense()
        sums = (keep & long, rows.visible & long, (result - dense).square(), dense.square())
        self.measured = self.measured.to(rows.x.device)
        self.measured += torch.stack([each.double().sum() for each in sums])
        return result

    def _point(self, length: Tensor) -> Tensor:
        return (PER_OCTAVE * (length / self.spec.k).log2()).round().long()

    def _reach(self, call: Call) -> None:
        points = int(self._point(torch.tensor(max(call.keys, self.spec.k)))) + 1
        more = max(points - self.table.shape[2], 0)
        self.table = torch.nn.functional.pad(self.table.to(call.q.device), (0, more))


def of_layer(spec: Theta, number: int) -> Theta:
    """`spec` with the k of the model's attention `number`, in order of appearance from 0."""
    return replace(spec, k=max(spec.k, spec.dense_k)) if number < spec.dense_layers else spec


def _result(call: Call, attend: Callable[[Band], Tensor]) -> Tensor:
    result = wide(call.q).new_zeros((*call.q.shape[:3], call.v.shape[-1]))
    for band in call.bands():
        rows = slice(band.rows.start, band.rows.stop)
        result[band.sample, band.heads, rows] = attend(band)
    return shaped(result, call.q)


def _nonzero(total: Tensor) -> Tensor:
    return total.masked_fill(total == 0, 1)


def _rows(table: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in table.tolist())
