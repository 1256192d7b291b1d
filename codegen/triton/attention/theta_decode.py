"""Launches Top-Theta decode; imports Triton."""

import functools

import torch
from torch import Tensor
from triton import next_power_of_2

from sparsefx.attention.operators import attention_output
from sparsefx.codegen.triton import loader
from sparsefx.codegen.triton.attention.decode_launch import (
    Problem,
    constants,
    scores_call,
    values_call,
)
from sparsefx.codegen.triton.attention.launch import Loaded, Sample, load, rows_contiguous
from sparsefx.codegen.triton.loader import Call

Tables = tuple[Tensor, Tensor, Tensor | None]  # lengths, theta and lost, as the operator takes them
FIELDS = 5  # rows of stats: theta_decode_template.select


def plan(
    loaded: Loaded,
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    tables: Tables,
    scale: float,
    topk: int,
    v_mean: Tensor | None,
    out: Tensor,
) -> tuple[tuple[Call, ...], Tensor | None]:
    """The four launches, and where they count the rows of V read: int32 [pairs, splits], or None.

    None: all of V is read.
    """
    group, pairs, cut = loaded.variant.group, problem.pairs, problem.cut()
    share, splits = cut
    reads = "all" if loaded.constants["V_MEAN"] and v_mean is None else "keys"
    read, scored = scores_call(loaded, problem, q, k, mask, scale, cut, sums=True)
    stats = scored.depth.new_empty((pairs, FIELDS, group))
    gathers = reads == "keys"
    counted = functools.partial(stats.new_empty, dtype=torch.int32)
    chosen = counted((pairs, problem.span)) if gathers else None
    counts = counted((pairs, splits)) if gathers else None
    points = tables[0].shape[0]
    settings = constants(loaded, "GROUP", "PLACEMENT", "DENOMINATOR")
    if settings["DENOMINATOR"] == "offline" and tables[2] is None:
        settings["DENOMINATOR"] = "none"  # as the operator means it
    decided = settings | {
        "ROWS": next_power_of_2(group),
        "STEP": problem.step,
        "POINTS": next_power_of_2(points),
        "BLOCK": 16,
        "READS": reads,
    }
    operands = (scored.depth, scored.parts, *tables, chosen, counts, stats)
    sizes = (problem.kv_heads, topk, problem.span, share, splits, points)
    # where nothing is listed, one program of a pair fills its stats
    grid = (pairs, splits if gathers else 1)
    select = Call(grid, (*operands, *sizes), decided, "select")
    values, summed = values_call(loaded, problem, v, scored, chosen, counts, stats, cut, reads)
    finish = settings | constants(loaded, "DIM", "PADDED", "V_MEAN")
    finish |= {"BLOCK": 16, "READS": reads}
    means = summed.means if v_mean is None else v_mean
    found = (summed.acc, summed.sums, means, counts, stats, out, splits)
    combine = Call((pairs * group,), found, finish, "combine")
    return (read, select, values, combine), counts


def theta(
    handle: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    tables: Tables,
    scale: float,
    window: int,
    topk: int,
    v_mean: Tensor | None = None,
) -> Tensor:
    """Theta attention of one query by the kernels that `handle` names; see `operators`.

    tables: lengths, theta and lost. v_mean: the mean of V over the keys that each row sees, float32
    [batch, heads, dim], from a caller who keeps a running sum beside the cache; without it, V-mean
    compensation reads all of V. Raises InvalidHandle, ShapeMismatch; KernelBuildFailed where Triton
    refuses a kernel on this device.
    """
    return _run(handle, q, k, v, mask, tables, scale, window, topk, v_mean)[0]


def run_counted(
    handle: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    tables: Tables,
    scale: float,
    window: int,
    topk: int,
    v_mean: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`theta`, and how many rows of V each KV head read: int32 [batch, kv_heads]."""
    out, counts = _run(handle, q, k, v, mask, tables, scale, window, topk, v_mean)
    if counts is None:
        return out, torch.full(k.shape[:2], k.shape[2], dtype=torch.int32, device=q.device)
    return out, counts.sum(1, dtype=torch.int32).view(k.shape[:2])


def _run(
    handle: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    tables: Tables,
    scale: float,
    window: int,
    topk: int,
    v_mean: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    loaded = load(handle)
    out = attention_output(q, k, v)
    if not out.numel() or not k.shape[2]:
        return out.zero_(), None
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    problem = Problem.of(loaded.variant, q, k, 1, window)
    lengths, limits, lost = tables
    tables = (
        lengths.contiguous(),
        limits.contiguous(),
        None if lost is None else lost.contiguous(),
    )
    given = None if v_mean is None else v_mean.contiguous()
    calls, counts = plan(loaded, problem, q, k, v, mask, tables, scale, topk, given, out)
    for call in calls:
        loader.run(handle, loaded.module, call, q)
    return out, counts


def sample(loaded: Loaded, given: Sample) -> tuple[Call, ...]:
    """The launches of a call with sixteen calibrated lengths, to be compiled."""
    q, k, v = given.q, given.k, given.v
    problem = Problem.of(loaded.variant, q, k, 1, given.window)
    limits = q.new_empty((q.shape[1], 16), dtype=torch.float32)
    tables = (limits.new_empty(16, dtype=torch.int64), limits, limits)
    out = attention_output(q, k, v)
    return plan(loaded, problem, q, k, v, given.mask, tables, given.scale, 64, None, out)[0]
