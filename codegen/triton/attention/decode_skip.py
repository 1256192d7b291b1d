"""Launches skip-softmax decode; imports Triton."""

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
from sparsefx.codegen.triton.attention.launch import (
    Loaded,
    Sample,
    head_factors,
    load,
    rows_contiguous,
)
from sparsefx.codegen.triton.form import Call


def plan(
    loaded: Loaded,
    problem: Problem,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    factor: Tensor,
    scale: float,
    out: Tensor,
) -> tuple[tuple[Call, ...], Tensor]:
    """The four launches, and where they count the kept tiles: int32 [pairs]."""
    group, pairs, factor = loaded.variant.group, problem.pairs, head_factors(factor, q)
    tiles, rows = problem.span // problem.tile, next_power_of_2(group)
    read, scored = scores_call(loaded, problem, q, k, mask, scale, problem.cut(), sums=False)
    chosen = q.new_empty((pairs, tiles), dtype=torch.int32)
    counts = q.new_empty((pairs,), dtype=torch.int32)
    stats = factor.new_empty((pairs, 1, group))
    operands = (scored.top, factor, chosen, counts, stats)
    sizes = (problem.kv_heads, problem.keys, problem.first, tiles)
    decided: dict[str, int | str] = {
        "GROUP": group,
        "ROWS": rows,
        "UNITS": problem.tile // problem.unit,
        "BLOCK": 32 if tiles <= 32 else max(32, min(256, 1024 // rows)),  # two serve all lengths
        "ORDER": loaded.constants["ORDER"],
    }
    select = Call((pairs,), (*operands, *sizes), decided, "select")
    share = problem.cut(2)  # most programs find nothing to do, so there are more of them
    values, summed = values_call(loaded, problem, v, scored, chosen, counts, stats, share, "tiles")
    finish = constants(loaded, "DIM", "PADDED", "GROUP", "BLOCK_K") | {"BLOCK": 16}
    combine = Call(
        (pairs * group,), (summed.acc, summed.sums, counts, out, *share), finish, "combine"
    )
    return (read, select, values, combine), counts


def run_counted(
    handle: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    factor: Tensor,
    scale: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """The result as `attention_output` lays it out, and how many tiles of V each KV head read.

    factor: [heads]. Counts are int32 [batch, kv_heads]. Raises InvalidHandle,
    DtypeMismatch, ShapeMismatch; KernelBuildFailed where Triton refuses a kernel on this device.
    """
    loaded = load(handle)
    out = attention_output(q, k, v)
    if not out.numel() or not k.shape[2]:
        return out.zero_(), torch.zeros(k.shape[:2], dtype=torch.int32, device=q.device)
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    problem = Problem.of(loaded.variant, q, k, loaded.variant.tile[1], window)
    calls, counts = plan(loaded, problem, q, k, v, mask, factor, scale, out)
    for call in calls:
        loader.run(handle, loaded.module, call, q)
    return out, counts.view(k.shape[:2])


def sample(loaded: Loaded, given: Sample) -> tuple[Call, ...]:
    """The launches of a call, to be compiled."""
    q, k, v = given.q, given.k, given.v
    factor = q.new_empty(q.shape[1], dtype=torch.float32)
    problem = Problem.of(loaded.variant, q, k, loaded.variant.tile[1], given.window)
    out = attention_output(q, k, v)
    return plan(loaded, problem, q, k, v, given.mask, factor, given.scale, out)[0]
