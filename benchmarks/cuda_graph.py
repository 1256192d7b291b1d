"""Time of one call on a GPU: replays of a CUDA graph that runs over copies of the operands."""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

REPLAYS = 30


def microseconds(
    call: Callable[[tuple[Tensor, ...]], Tensor], operands: tuple[Tensor, ...]
) -> float:
    """Median time of one call, over copies of `operands` that together exceed the L2 cache twice.

    Inside a model other layers have pushed an operand out of the cache before its next use.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in operands)
    cache = torch.cuda.get_device_properties(operands[0].device).L2_cache_size
    copies = [tuple(t.clone() for t in operands) for _ in range(2 * cache // size + 2)]
    call(copies[0])  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in copies:
            call(copy)
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(copies))
    return float(statistics.median(times))
