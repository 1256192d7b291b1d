"""The dense linears that a sparse one is compared with on CPU, as sides of `turns.in_turns`.

fp32    torch eager, Inductor, onnxruntime; torch.sparse CSR (of the pruned weight) beside them
bf16    torch eager, Inductor
int8    onnxruntime dynamic (per-channel weights, x quantised at run time), torch weight-only
int4    onnxruntime MatMulNBits, blocks of 32, accuracy level 4 (products in int8)
"""

import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import dense_ort
from benchmarks.turns import Side
from sparsefx.quantised_dense import int8_weights
from sparsefx.timing import rotating

COPIES = 24  # of the weight, at most

CPU = torch.device("cpu")


Linear = Callable[[Tensor, Tensor], object]


def compiled() -> Linear:
    """F.linear under Inductor: one graph for one row of x and one for all other numbers of rows."""
    torch.compiler.reset()  # guards of graphs of other shapes would be tried first

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    inductor: Linear = torch.compile(linear)
    return inductor


def rivals(
    value_type: str, weight: Tensor, x: Tensor, inductor: Linear, chains: dense_ort.Chains
) -> list[Side]:
    """The sides of one value type; `inductor`: `compiled()`; `chains`: of the float32 weight."""
    return list(_rivals(value_type, weight, x, inductor, chains))


def _rivals(
    value_type: str, weight: Tensor, x: Tensor, inductor: Linear, chains: dense_ort.Chains
) -> Iterator[Side]:
    if value_type in ("fp32", "bf16"):
        yield over_copies("torch eager", partial(F.linear, x), weight)
        yield over_copies("Inductor", partial(inductor, x), weight)
    if value_type == "int8":
        yield from _int8_weights(weight, x.bfloat16())
    if value_type in dense_ort.NAMES:
        yield chains.side(value_type, x)


def _int8_weights(weight: Tensor, x: Tensor) -> Iterator[Side]:
    product = int8_weights(weight)
    if product is not None:
        copies = rotating(product.operands, CPU, COPIES)
        yield Side("torch int8 weights", [partial(product.bound(copy), x) for copy in copies])


def over_copies(name: str, run: Callable[[Tensor], object], weight: Tensor) -> Side:
    """A side that calls `run` on one clone of the weight after the other."""
    copies = (copy for (copy,) in rotating((weight,), CPU, COPIES))
    return Side(name, [partial(run, copy) for copy in copies])


def csr(name: str, pruned: Tensor, x: Tensor) -> Side:
    """torch's own sparse product (MKL), float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "in beta state"
        sparse = pruned.to_sparse_csr()
    return Side(name, [lambda: torch.sparse.mm(sparse, x.t())])
