"""What this CPU can do at best, measured now: bytes a second, multiplications plus additions."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.dense_ort import onnx_models, session
from sparsefx.cost import Cost

SIZE = 1536  # of the square products
STREAM = 64 << 20  # floats that are read once
SECONDS = 0.5  # for each figure


@dataclass(frozen=True)
class Peaks:
    """Speeds a second: `flops` by value type, `bandwidth` in bytes read from memory."""

    flops: dict[str, float]
    bandwidth: float

    def seconds(self, cost: Cost, value_type: str, density: float) -> tuple[float, str]:
        """The least time that any kernel could take, and what binds it: "memory" or "arithmetic".

        Each operand moves once, and each stored value is multiplied once for each row of x.
        """
        memory = float(cost.bytes) / self.bandwidth
        arithmetic = float(cost.flops) * density / self.flops[value_type]
        return max((memory, "memory"), (arithmetic, "arithmetic"))


def cpu() -> Peaks:
    """Of this machine with torch's present threads, by the best library; takes five seconds.

    fp32, bf16: torch's products; int8: onnxruntime's, of which int4 is one too.
    """
    square = torch.randn(SIZE, SIZE)
    work = 2 * SIZE**3
    short = square.bfloat16()
    eight = session(onnx_models(square)["int8"].SerializeToString())
    int8 = work / _best(partial(eight.run, None, {"x": square.numpy()}))
    flops = {
        "fp32": work / _best(partial(F.linear, square, square)),
        "bf16": work / _best(partial(F.linear, short, short)),
        "int8": int8,
        "int4": int8,
    }
    stream = torch.ones(STREAM)
    wide, vector = stream.view(-1, 8192), torch.ones(8192)
    fastest = min(_best(stream.sum), _best(partial(torch.mv, wide, vector)))
    return Peaks(flops, stream.nbytes / fastest)


def _best(run: Callable[[], object]) -> float:
    times = []
    end = time.perf_counter() + SECONDS
    while not times or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
