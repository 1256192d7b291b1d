"""The operator sparsefx_cuda::linear: 2:4 products of cuSPARSELt and of CUTLASS.

A handle is "library|algorithm|epilogue". Nothing is padded or converted in a call: who lowers sees
to it that rows are a multiple of ROWS. No call waits for the GPU, so CUDA graphs capture it.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

from sparsefx import epilogue as epilogues
from sparsefx.ops import linear_output
from sparsefx.target import LINEAR_SCHEMA

ROWS = 8  # both libraries take 16-bit inputs whose rows are multiples of 16 bytes, on either side

_LIBRARY = torch.library.Library("sparsefx_cuda", "DEF")
_LIBRARY.define(LINEAR_SCHEMA)


def linear(
    x: Tensor,
    packed: Sequence[Tensor],
    bias: Tensor | None,
    extras: Sequence[Tensor],
    handle: str,
    features: int,
) -> Tensor:
    """epilogue(x W^T + bias); x [..., in] of a multiple of ROWS rows; packed: made by `lower`."""
    library, algorithm, epilogue = handle.split("|", 2)
    rows = x.reshape(-1, x.shape[-1])
    if library == "cusparselt":
        y = torch._cslt_sparse_mm(
            packed[0], rows.t(), bias=bias, transpose_result=True, alg_id=int(algorithm)
        )
    else:
        y = torch._sparse_semi_structured_linear(rows, packed[0], packed[1], bias=bias)
    return epilogues.apply(y.view(*x.shape[:-1], y.shape[-1]), epilogue, extras).contiguous()


def _meaning(
    x: Tensor,
    packed: Sequence[Tensor],
    bias: Tensor | None,
    extras: Sequence[Tensor],
    handle: str,
    features: int,
) -> Tensor:
    """On a CPU, where tests look at what CUTLASS's tensors hold."""
    _, _, epilogue = handle.split("|", 2)
    weight = sparse_semi_structured_to_dense_cutlass(*packed)
    return epilogues.apply(F.linear(x, weight, bias), epilogue, extras).contiguous()


_LIBRARY.impl("linear", linear, "CUDA")
_LIBRARY.impl("linear", _meaning, "CPU")
torch.library.register_fake(
    "sparsefx_cuda::linear",
    lambda x, packed, bias, extras, handle, features: linear_output(x, features),
    lib=_LIBRARY,
)
