"""The dense linears that a sparse one is compared with on a GPU, as sides of `turns.in_turns`.

    bf16        cuBLAS; torch.compile, max-autotune; of 2:4 weights torch's semi-structured product
    fp8, int8   torch._scaled_mm and torch._int_mm, x quantised beforehand: at their best
    int4        torch's weight-only product, a scale for each 128

What the GPU or the shape does not support is left out: each rival is tried once.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cuda_graph import captured, copies_of
from benchmarks.turns import Side
from sparsefx.quantised_dense import int4_weights

INT4_GROUP = 128
FP8_LARGEST = 448.0

Run = Callable[[tuple[Tensor, ...]], object]


def side(name: str, run: Run, operands: tuple[Tensor, ...]) -> Side:
    """`run` over copies of `operands` that together exceed the L2 cache, in one CUDA graph."""
    copies = copies_of(operands)
    graph = captured([partial(run, copy) for copy in copies])
    return Side(name, [graph.replay], per_call=len(copies))


def rivals(x: Tensor, weight: Tensor, pruned: Tensor | None) -> list[Side]:
    """Those that run here for x [rows, in] and weight [out, in] in bf16; `pruned`: it as 2:4."""
    found = []
    for name, build in _builders(x, weight, pruned):
        try:
            found.append(side(name, *build()))
        except (RuntimeError, NotImplementedError):  # what the GPU or torch has not
            torch.cuda.synchronize()
    return found


def _builders(
    x: Tensor, weight: Tensor, pruned: Tensor | None
) -> Iterator[tuple[str, Callable[[], tuple[Run, tuple[Tensor, ...]]]]]:
    yield "cuBLAS bf16", lambda: (lambda w: F.linear(x, w[0]), (weight,))
    yield "torch.compile max-autotune bf16", lambda: (_autotuned(x), (weight,))
    yield "fp8", lambda: _fp8(x, weight)
    yield "int8", lambda: _int8(x, weight)
    yield "int4 weights", lambda: _int4(x, weight)
    if pruned is not None:
        yield "torch semi-structured", lambda: _semi_structured(x, pruned)


def _autotuned(x: Tensor) -> Run:
    torch.compiler.reset()

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    compiled = torch.compile(linear, mode="max-autotune-no-cudagraphs", dynamic=False)
    return lambda w: compiled(x, w[0])


def _semi_structured(x: Tensor, pruned: Tensor) -> tuple[Run, tuple[Tensor, ...]]:
    compressed = torch._cslt_compress(pruned)
    return lambda w: torch._cslt_sparse_mm(w[0], x.t()).t(), (compressed,)


def _fp8(x: Tensor, weight: Tensor) -> tuple[Run, tuple[Tensor, ...]]:
    (xs, x_scale), (ws, w_scale) = (_scaled(each, FP8_LARGEST) for each in (x, weight))
    x8, w8 = xs.to(torch.float8_e4m3fn), ws.to(torch.float8_e4m3fn)

    def run(operands: tuple[Tensor, ...]) -> Tensor:
        return torch._scaled_mm(
            x8, operands[0].t(), scale_a=x_scale, scale_b=w_scale, out_dtype=torch.bfloat16
        )

    return run, (w8,)


def _int8(x: Tensor, weight: Tensor) -> tuple[Run, tuple[Tensor, ...]]:
    x8, w8 = (_scaled(each, 127.0)[0].round().to(torch.int8) for each in (x, weight))
    return lambda w: torch._int_mm(x8, w[0].t()), (w8,)


def _int4(x: Tensor, weight: Tensor) -> tuple[Run, tuple[Tensor, ...]]:
    product = int4_weights(weight, INT4_GROUP)
    if product is None:
        raise NotImplementedError(f"int4 weights of {tuple(weight.shape)}")
    bound = product.bound
    return lambda w: bound(w)(x), product.operands


def _scaled(tensor: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    scale = tensor.float().abs().max() / largest
    return tensor.float() / scale, scale
