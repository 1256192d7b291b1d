"""Time of one call on a GPU: replays of a CUDA graph that runs over copies of the operands."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

REPLAYS = 30


def copies_of(operands: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """Copies of `operands` that together exceed the L2 cache twice.

    Inside a model other layers have pushed an operand out of the cache before its next use.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in operands)
    cache = torch.cuda.get_device_properties(operands[0].device).L2_cache_size
    return [tuple(t.clone() for t in operands) for _ in range(2 * cache // size + 2)]


def captured(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A graph that makes the calls one after the other."""
    calls[0]()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def microseconds(
    call: Callable[[tuple[Tensor, ...]], object], operands: tuple[Tensor, ...]
) -> float:
    """Median time of one call, over `copies_of(operands)`."""
    copies = copies_of(operands)
    graph = captured([partial(call, copy) for copy in copies])
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(copies))
    return float(statistics.median(times))
