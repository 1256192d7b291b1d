"""Launches Top-Theta decode; imports Triton."""

import functools

import torch
from torch import Tensor
from triton import next_power_of_2

from sparsefx.attention.operands import check_dtype, check_shape, checked_tables
from sparsefx.attention.operators import attention_output
from sparsefx.codegen.triton import loader
from sparsefx.codegen.triton.attention.decode_launch import (
    Problem,
    Scored,
    constants,
    scores_call,
    values_call,
)
from sparsefx.codegen.triton.attention.emit import Constants
from sparsefx.codegen.triton.attention.launch import Loaded, Sample, load, rows_contiguous
from sparsefx.codegen.triton.form import Call

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
    reads = "all" if loaded.constants["V_MEAN"] and v_mean is None else "keys"
    read, scored = scores_call(loaded, problem, q, k, mask, scale, cut, sums=True)
    settings = constants(loaded, "GROUP", "PLACEMENT", "DENOMINATOR")
    settings |= {"BLOCK": 16, "READS": reads}
    if settings["DENOMINATOR"] == "offline" and tables[2] is None:
        settings["DENOMINATOR"] = "none"  # as the operator means it
    select, listed = _select_call(problem, scored, tables, topk, cut, settings)
    values, summed = values_call(loaded, problem, v, scored, *listed, cut, reads)
    finish = settings | constants(loaded, "DIM", "PADDED", "V_MEAN")
    means = summed.means if v_mean is None else v_mean
    _, counts, stats = listed
    found = (summed.acc, summed.sums, means, counts, stats, out, cut[1])
    combine = Call((pairs * group,), found, finish, "combine")
    return (read, select, values, combine), counts


def _select_call(
    problem: Problem,
    scored: Scored,
    tables: Tables,
    topk: int,
    cut: tuple[int, int],
    settings: Constants,
) -> tuple[Call, tuple[Tensor | None, Tensor | None, Tensor]]:
    """The launch that decides, and its `chosen`, `counts` and `stats`; with no list, only stats."""
    pairs, group, points = problem.pairs, scored.depth.shape[1], tables[0].shape[0]
    stats = scored.depth.new_empty((pairs, FIELDS, group))
    gathers = settings["READS"] == "keys"
    counted = functools.partial(stats.new_empty, dtype=torch.int32)
    chosen = counted((pairs, problem.span)) if gathers else None
    counts = counted((pairs, cut[1])) if gathers else None
    decided = settings | {
        "ROWS": next_power_of_2(group),
        "STEP": problem.step,
        "POINTS": next_power_of_2(points),
    }
    operands = (scored.depth, scored.parts, *tables, chosen, counts, stats)
    sizes = (problem.kv_heads, topk, problem.span, *cut, points)
    # where nothing is listed, one program of a pair fills its stats
    grid = (pairs, cut[1] if gathers else 1)
    return Call(grid, (*operands, *sizes), decided, "select"), (chosen, counts, stats)


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
    compensation reads all of V. Raises InvalidHandle, ShapeMismatch, DtypeMismatch;
    KernelBuildFailed where Triton refuses a kernel on this device.
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
    tables = checked_tables(*tables, q.shape[1])
    if v_mean is not None:
        check_shape("v_mean", v_mean, (*q.shape[:2], v.shape[3]))
        check_dtype("v_mean", v_mean, torch.float32)
    out = attention_output(q, k, v)
    if not out.numel() or not k.shape[2]:
        return out.zero_(), None
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    problem = Problem.of(loaded.variant, q, k, 1, window)
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
