"""Tables of what trial factors do -> the factor of each head, under one budget."""

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparsefx.attention.spec import SkipSoftmax
from sparsefx.attention.thresholds import SkipThresholds
from sparsefx.calibrate.attention.allocate import reach, within
from sparsefx.calibrate.attention.law import at_factor, fit
from sparsefx.calibrate.attention.skips import SkipStatistics, Tables

Factors = list[Tensor]
TOLERANCE = 0.02


class SparsityOutOfReach(UserWarning):
    """No threshold skips as many tiles as were asked for."""


def solve(spec: SkipSoftmax, sites: Mapping[str, SkipStatistics]) -> dict[str, SkipThresholds]:
    """The thresholds of all attentions that `spec` covers, by name."""
    statistics = list(sites.values())
    for each in statistics:
        each.prefill.move(torch.device("cpu"))
        each.decode.move(torch.device("cpu"))
    prefill = _choose(spec, [each.prefill for each in statistics], "prefill")
    decode = _choose(spec, [each.decode for each in statistics], "decode")
    chosen = zip(sites.items(), prefill, decode, strict=True)
    return {name: thresholds(each, p, d) for (name, each), p, d in chosen}


def _choose(spec: SkipSoftmax, tables: Sequence[Tables], phase: str) -> Factors:
    """The factor of each head of each site [heads], in one phase."""
    if spec.factors is not None:
        return [each.factors.expand(each.heads) for each in tables]
    if not any(float(each.visible.sum()) for each in tables):
        return [torch.zeros(each.heads) for each in tables]
    per_head = spec.per == "head"
    if spec.error is not None:
        return _within_error(spec.error, tables, per_head)
    assert spec.sparsity is not None
    _check_reach(spec.sparsity, tables, phase)
    return (_spread if per_head else _single)(spec.sparsity, tables)


def _spread(sparsity: float, tables: Sequence[Tables]) -> Factors:
    """Factors of all heads under one budget: least cost at the wanted number of skipped tiles."""
    trials = max(each.factors.numel() for each in tables)
    benefit = torch.cat([_units(each, each.skipped, trials) for each in tables])
    cost = torch.cat([_units(each, _cost(each), trials) for each in tables])
    chosen = reach(benefit, cost, sparsity * _visible(tables))
    units = [each.heads // each.together for each in tables]
    parts = zip(tables, chosen.split(units), strict=True)
    return [_factors(each, choice) for each, choice in parts]


def _cost(table: Tables) -> Tensor:
    """Squared output error relative to the layer's own output, [heads, trials].

    Of the costs tried it is the plainest that is near the best. Judged by a second-order estimate
    of the loss (error times mean squared gradient of each head, on text of SmolLM2 with half of the
    tiles skipped), where minimising the estimate itself is 1 and needs a backward pass, this comes
    to 1.21, the relative error behind the output projection to 1.41, lost mass to 1.9, absolute
    error to 2.4 and one factor for all heads to 3.9.
    """
    return table.error / table.norm.sum().clamp(min=torch.finfo(torch.float64).tiny)


def _single(sparsity: float, tables: Sequence[Tables]) -> Factors:
    """The paper's one factor for all, from a * exp(b * sparsity)."""
    factors, skipped = _curve(tables)
    law = fit(factors, skipped)
    if law is None:  # hardly anything skips: the smallest trial that skips enough
        factor = float(factors[int((skipped < sparsity).sum().clamp(max=len(factors) - 1))])
    else:
        factor = min(law.factor(sparsity), float(factors[-1]))
    return [torch.full((each.heads,), factor) for each in tables]


def _within_error(error: float, tables: Sequence[Tables], per_head: bool) -> Factors:
    """The most skips with no site's error above `error`, by heads or by one factor for all."""
    if per_head:
        return [_largest(each, error) for each in tables]
    factors = max((each.factors for each in tables), key=len)
    worst = torch.stack([_errors(each, factors) for each in tables]).amax(0)
    # Once above, always above: a larger factor only skips more.
    fits = int((worst <= error).long().cumprod(0).sum())
    factor = float(factors[fits - 1]) if fits else 0.0
    return [torch.full((each.heads,), factor) for each in tables]


def _largest(table: Tables, error: float) -> Tensor:
    trials = table.factors.numel()
    benefit, cost = _units(table, table.skipped, trials), _units(table, table.error, trials)
    return _factors(table, within(benefit, cost, error**2 * float(table.norm.sum())))


def thresholds(
    statistics: SkipStatistics, prefill: Tensor | None = None, decode: Tensor | None = None
) -> SkipThresholds:
    """Factors of the heads [heads] with what they do to the data; by default, skip nothing."""
    nothing = torch.zeros(statistics.prefill.heads)
    prefill, decode = (nothing if each is None else each for each in (prefill, decode))
    phases = ((statistics.prefill, prefill), (statistics.decode, decode))
    measured = [_measured(tables, factor) for tables, factor in phases]
    return SkipThresholds(
        prefill=tuple(prefill.tolist()),
        decode=tuple(decode.tolist()),
        tile=statistics.tile,
        order=statistics.order,
        keys=statistics.keys,
        skipped=(measured[0][0], measured[1][0]),
        error=(measured[0][1], measured[1][1]),
        lost_mass=(measured[0][2], measured[1][2]),
        r2=(_r2(statistics.prefill), _r2(statistics.decode)),
    )


def _measured(tables: Tables, factor: Tensor) -> tuple[float | None, float | None, float | None]:
    """Share of tiles skipped, relative output error, largest mean mass that a head lost."""
    if not _visible([tables]):
        return None, None, None
    skipped, error, lost = (
        at_factor(tables.factors, table, factor)
        for table in (tables.skipped, tables.error, tables.lost)
    )
    norm = tables.norm.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return (
        float(skipped.sum() / tables.visible.sum()),
        float((error.sum() / norm).sqrt()),
        float((lost / tables.rows.clamp(min=1)).max()),
    )


def _r2(tables: Tables) -> float | None:
    if not _visible([tables]):
        return None
    law = fit(*_curve([tables]))
    return None if law is None else law.r2


def _curve(tables: Sequence[Tables]) -> tuple[Tensor, Tensor]:
    """Share of visible tiles that each single trial factor skips, over all sites."""
    factors = max((each.factors for each in tables), key=len)
    skipped = torch.stack([_at_all(each, each.skipped, factors) for each in tables])
    return factors, skipped.sum(0) / _visible(tables)


def _errors(table: Tables, factors: Tensor) -> Tensor:
    """Relative output error of a site under each single factor."""
    norm = table.norm.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return (_at_all(table, table.error, factors) / norm).sqrt()


def _at_all(tables: Tables, table: Tensor, factors: Tensor) -> Tensor:
    """The sum of `table` over the heads, at each of `factors`."""
    total = table.sum(0, keepdim=True)
    return at_factor(tables.factors, total.expand(len(factors), -1), factors)


def _units(tables: Tables, table: Tensor, trials: int) -> Tensor:
    """[heads, trials] -> [units that decide together, 1 + trials]: skipping nothing comes first."""
    by_unit = table.unflatten(0, (-1, tables.together)).sum(1)
    last = by_unit[:, -1:].expand(-1, trials - by_unit.shape[1])
    return torch.cat((by_unit.new_zeros(by_unit.shape[0], 1), by_unit, last), 1)


def _factors(tables: Tables, chosen: Tensor) -> Tensor:
    """The factor of each head, from the choice of each unit."""
    known = torch.cat((tables.factors.new_zeros(1), tables.factors)).cpu()
    return known[chosen.clamp(max=len(known) - 1)].repeat_interleave(tables.together)


def _visible(tables: Sequence[Tables]) -> float:
    return float(sum(float(each.visible.sum()) for each in tables))


def _check_reach(sparsity: float, tables: Sequence[Tables], phase: str) -> None:
    most = sum(float(each.skipped.amax(1).sum()) for each in tables) / _visible(tables)
    if most < sparsity - TOLERANCE:
        warnings.warn(
            f"{sparsity:.0%} of the tiles are to be skipped in {phase}, and the calibration data "
            f"let {most:.1%} be skipped at most; longer inputs or smaller tiles skip more",
            SparsityOutOfReach,
            stacklevel=2,
        )
