"""How the attention kernels of one query share out the keys; imports Triton.

Nothing waits for the device and every size follows from the shapes, so a call can be captured in a
CUDA graph.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from sparsefx.codegen.triton.attention.emit import Constants
from sparsefx.codegen.triton.attention.launch import Loaded
from sparsefx.codegen.triton.attention.variant import AttentionVariant
from sparsefx.codegen.triton.form import Call
from sparsefx.errors import ShapeMismatch

PROGRAMS = 16  # that each processor is given: four at a time, so that the last few matter little
LEAST = 4  # steps of a program, or filling its pipeline costs more than it gains
ABSENT = 8  # processors of a device that is not there


@dataclass(frozen=True)
class Problem:
    """What all launches of one call agree on.

    pairs: batch x KV heads; keys of which those from `low` on are seen; columns stand for the keys
    `first` .. `first + span`, whole tiles and whole steps; `step` keys are read at once, `unit` of
    them have one stored maximum; `tile` keys are kept or skipped together; `rows`: query heads of a
    KV head, padded for the tensor cores.
    """

    pairs: int
    kv_heads: int
    keys: int
    low: int
    first: int
    span: int
    step: int
    unit: int
    tile: int
    rows: int
    processors: int

    @classmethod
    def of(
        cls, variant: AttentionVariant, q: Tensor, k: Tensor, tile: int, window: int
    ) -> "Problem":
        """The problem of a call; `tile` is 1 where single keys are kept. Raises ShapeMismatch."""
        if q.shape[2] != 1:
            raise ShapeMismatch(
                name="q",
                shape=tuple(q.shape),
                rule="this kernel was built for one query",
                remedy="Compile the model again",
            )
        batch, kv_heads, keys, _ = k.shape
        step = _step(variant)
        low = max(keys - window, 0) if window else 0
        whole = max(step, tile)
        first = low // whole * whole
        return cls(
            pairs=batch * kv_heads,
            kv_heads=kv_heads,
            keys=keys,
            low=low,
            first=first,
            span=cdiv(keys - first, whole) * whole,
            step=step,
            unit=min(tile, step) if tile > 1 else step,
            tile=tile,
            rows=max(16, next_power_of_2(variant.group)),
            processors=_processors(q.device),
        )

    def cut(self, factor: int = 1) -> tuple[int, int]:
        """(keys of a program, programs of a pair): `factor` x PROGRAMS a processor over all pairs.

        But at least LEAST steps to a program, and whole tiles.
        """
        wanted = max(1, factor * PROGRAMS * self.processors // self.pairs)
        share = max(cdiv(self.span, wanted), LEAST * self.step)
        whole = max(self.step, self.tile)
        share = min(cdiv(share, whole) * whole, self.span)
        return share, cdiv(self.span, share)


def _step(variant: AttentionVariant) -> int:
    """Keys read at once: 16 KiB of K for heads of 128 in half precision, three stages of which."""
    return 32 if variant.head_dim > 128 or variant.dtype == torch.float32 else 64


def _warps(problem: Problem) -> int:
    """What sixty-four rows of query heads need, or their sums spill."""
    return 8 if problem.rows > 32 else 4


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return ABSENT
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@dataclass(frozen=True)
class Scored:
    """What the scores launch leaves: `depth`, and either `top` or `parts`, of its kernel."""

    depth: Tensor
    top: Tensor | None
    parts: Tensor | None


def constants(loaded: Loaded, *names: str) -> Constants:
    """The variant's constants of these names, for the constexpr arguments of a launch."""
    return {name: loaded.constants[name] for name in names}


def scores_call(
    loaded: Loaded,
    problem: Problem,
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    scale: float,
    cut: tuple[int, int],
    sums: bool,
) -> tuple[Call, Scored]:
    """The launch that reads K. Half-precision depths only where no threshold is laid on a score."""
    group, empty = loaded.variant.group, q.new_empty
    half = q.dtype != torch.float32 and not sums
    depth_type = torch.float16 if half else torch.float32
    lines, splits = (problem.pairs, group), cut[1]
    scored = Scored(
        empty((*lines, problem.span), dtype=depth_type),
        None if sums else empty((*lines, problem.span // problem.unit), dtype=torch.int32),
        empty((problem.pairs, splits, 3, group), dtype=torch.float32) if sums else None,
    )
    shape = (q.shape[0], q.shape[1], 1, problem.keys)
    seen = None if mask is None else mask.expand(shape)
    strides = (0, 0, 0) if seen is None else (*seen.stride()[:2], seen.stride()[3])
    if seen is not None and seen.dtype == torch.bool:
        seen = seen.view(torch.uint8)
    sizes = (problem.kv_heads, problem.keys, problem.low, problem.first, problem.span, *cut)
    arguments = (q, k, seen, scored.depth, scored.top, scored.parts, scale, *sizes)
    options: Constants = constants(loaded, "DIM", "PADDED", "GROUP", "MASK") | {
        "ROWS": problem.rows,
        "STEP": problem.step,
        "UNIT": problem.unit,
        "MASK_HEADS": int(strides[1] != 0),
        "SUMS": int(sums),
        "num_warps": _warps(problem),
        "num_stages": 3,
    }
    every = (*arguments, *q.stride()[:2], *k.stride()[:3], *strides)
    return Call((problem.pairs, splits), every, options, "scores"), scored


@dataclass(frozen=True)
class Summed:
    """What the values launch leaves: `acc`, `sums` and `means` of its kernel."""

    acc: Tensor
    sums: Tensor
    means: Tensor | None


def values_call(
    loaded: Loaded,
    problem: Problem,
    v: Tensor,
    scored: Scored,
    chosen: Tensor | None,
    counts: Tensor | None,
    stats: Tensor,
    cut: tuple[int, int],
    reads: str,
) -> tuple[Call, Summed]:
    """The launch that reads V: `reads` as in its kernel, stats [pairs, fields, group]."""
    group, dim = loaded.variant.group, loaded.variant.head_dim
    share, splits = cut
    parts = (problem.pairs, splits, group, dim)
    summed = Summed(
        stats.new_empty(parts),
        stats.new_empty((problem.pairs, splits, 2, group)),
        stats.new_empty(parts) if reads == "all" else None,
    )
    operands = (v, scored.depth, scored.top, chosen, counts, stats)
    sizes = (problem.kv_heads, problem.keys, problem.first, problem.span, share, splits)
    arguments = (*operands, summed.acc, summed.sums, summed.means, *sizes, *v.stride()[:3])
    options: Constants = constants(loaded, "DIM", "PADDED", "GROUP") | {
        "ROWS": problem.rows,
        "STEP": problem.step,
        "UNIT": problem.unit,
        "TILE": problem.tile,
        "READS": reads,
        "FIELDS": stats.shape[1],
        "PLACEMENT": loaded.constants.get("PLACEMENT", ""),
        "num_warps": _warps(problem),
        # a list is read two steps before the rows of V on it, and these two steps before their use
        "num_stages": 3 if reads == "all" else 5,
    }
    return Call((problem.pairs, splits), arguments, options, "values"), summed
