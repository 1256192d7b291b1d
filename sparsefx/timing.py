"""Median time of two ways to do one thing, run in turns on buffers that are not in the cache."""

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from sparsefx.devices import MEGABYTE, last_level_cache

Copy = tuple[Tensor, ...]
C = TypeVar("C")
RunOn = Callable[[C], Tensor]
Run = RunOn[Copy]

SECONDS = 0.1  # aim of one comparison
FEWEST, MOST = 5, 400  # pairs
BYTES = 256 * MEGABYTE  # of all copies together

_BATCH = 16  # pairs that wait in the GPU's queue at a time
_QUEUE_CYCLES = 4_000_000  # some 2 ms: longer than it takes to queue a batch


@dataclass(frozen=True)
class Timing:
    """Median microseconds of either side, and how surely the second is faster.

    bound: the ratio second / first lies below it with 95 % confidence.
    """

    first_us: float
    second_us: float
    bound: float


def paired(first: Run, second: Run, tensors: Copy, device: torch.device) -> Timing:
    """Times `first` and `second`, each called on copies of `tensors` in turn.

    The two alternate, and so does which goes first, so that other load and clock changes meet both.
    """
    return paired_over(first, second, partial(rotating, tensors, device), device)


def paired_over(
    first: RunOn[C], second: RunOn[C], copies: Callable[[int], Sequence[C]], device: torch.device
) -> Timing:
    """The same on what `copies` makes, at most as many as it is told to."""
    on_gpu = device.type == "cuda"
    pairs = _cuda_pairs if on_gpu else _cpu_pairs
    with torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
        warm = pairs(first, second, iter([*copies(1)] * 2))
        early, late = (min(column) for column in zip(*warm, strict=True))
        count = min(max(int(SECONDS * 1e6 / max(early + late, 1e-3)), FEWEST), MOST)
        if count == FEWEST and late > 2 * early:
            return _summary(warm)  # slow and hopeless, bound > 2: not worth an exact answer
        turn = itertools.cycle(copies(count))
        return _summary(pairs(first, second, itertools.islice(turn, count)))


def least_us(run: Callable[[], Tensor]) -> float:
    """The least time of three calls, in microseconds, their work on a GPU finished."""
    times = []
    for _ in range(3):
        start = time.perf_counter_ns()
        if run().is_cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter_ns() - start) / 1e3)
    return min(times)


def rotating(tensors: Copy, device: torch.device, most: int) -> list[Copy]:
    """`tensors` and clones of them, enough to overflow the last-level cache four times.

    In a model the other layers' weights have pushed a weight out of the cache before its next use;
    a loop over one buffer would time the cache. At most `most` copies, and BYTES in all.
    """
    each = max(1, sum(tensor.nbytes for tensor in tensors))
    wanted = math.ceil(4 * last_level_cache(device) / each)
    count = min(wanted, BYTES // each, most)
    clones = [tuple(tensor.clone() for tensor in tensors) for _ in range(count - 1)]
    return [tensors, *clones]


def _summary(times: Sequence[tuple[float, float]]) -> Timing:
    """Medians, and the order statistic of the ratios above their median with 95 % confidence.

    Of n ratios, the number below the true median is binomial, n/2 +- 1.64 sqrt(n)/2.
    """
    firsts, seconds = zip(*times, strict=True)
    ratios = sorted(second / max(first, 1e-3) for first, second in times)
    rank = min(len(ratios), math.ceil(len(ratios) / 2 + 0.82 * math.sqrt(len(ratios))))
    return Timing(statistics.median(firsts), statistics.median(seconds), ratios[rank - 1])


def _cpu_pairs(first: RunOn[C], second: RunOn[C], copies: Iterator[C]) -> list[tuple[float, float]]:
    times = []
    for index, copy in enumerate(copies):
        if index % 2:
            late = _clock(second, copy)
            times.append((_clock(first, copy), late))
        else:
            early = _clock(first, copy)
            times.append((early, _clock(second, copy)))
    return times


def _clock(run: RunOn[C], copy: C) -> float:
    start = time.perf_counter_ns()
    run(copy)
    return (time.perf_counter_ns() - start) / 1e3


def _cuda_pairs(
    first: RunOn[C], second: RunOn[C], copies: Iterator[C]
) -> list[tuple[float, float]]:
    times: list[tuple[float, float]] = []
    while batch := list(itertools.islice(copies, _BATCH)):
        # The GPU sleeps while the batch is queued; otherwise events would time Python's launches.
        torch.cuda._sleep(_QUEUE_CYCLES)
        events = [_record_pair(first, second, copy, index) for index, copy in enumerate(batch)]
        torch.cuda.synchronize()
        times += [(1e3 * a.elapsed_time(b), 1e3 * c.elapsed_time(d)) for a, b, c, d in events]
    return times


def _record_pair(
    first: RunOn[C], second: RunOn[C], copy: C, index: int
) -> tuple[torch.cuda.Event, torch.cuda.Event, torch.cuda.Event, torch.cuda.Event]:
    if index % 2:
        late = _record(second, copy)
        return (*_record(first, copy), *late)
    early = _record(first, copy)
    return (*early, *_record(second, copy))


def _record(run: RunOn[C], copy: C) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = _event(), _event()
    start.record()
    run(copy)
    end.record()
    return start, end


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
