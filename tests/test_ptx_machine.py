"""The machine for inline PTX agrees with CUTLASS, whose order of metadata runs on real GPUs.

PyTorch stores 2:4 weights for CUTLASS's kernels of m16n8k32 (`sparse_semi_structured_from_dense_
cutlass`): 16-bit words of metadata, reordered so that a lane of mma.sp finds its own. The order is
that of 32 rows, of which the first 16 are multiplied with selector 0 and the others with 1.
"""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from sparsefx import NM
from tests.ptx_machine import run

NAME = "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{0}.{0}.f32"
VECTORS = (", ".join(f"{name}{i}" for i in range(4)) for name in "dabc")
REGISTERS = ", ".join(f"{{{each}}}" for each in VECTORS)
G, T = np.divmod(np.arange(32), 4)


def pairs(matrix: Tensor, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Two neighbours of a row for each lane, the first in the low half: [1, 32] words."""
    halves = matrix.contiguous().view(torch.int16).numpy().view(np.uint16).astype(np.uint32)
    return (halves[row, column] | halves[row, column + 1] << 16)[None]


@pytest.mark.parametrize("selector", [0, 1])
@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, "bf16"), (torch.float16, "f16")])
def test_metadata_as_cutlass_orders_it(dtype: torch.dtype, kind: str, selector: int) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randint(1, 9, (32, 32), generator=generator).to(dtype)
    weight = weight * NM(2, 4).keep(torch.rand(32, 32, generator=generator))
    x = torch.randint(-8, 9, (8, 32), generator=generator).to(dtype)
    stored, metadata = sparse_semi_structured_from_dense_cutlass(weight)
    words = metadata.view(-1).numpy().view(np.uint32)  # one a lane
    registers = {"e": words[None], **{f"c{i}": np.zeros((1, 32), np.uint32) for i in range(4)}}
    for i in range(4):  # A: as a dense m16n8k16 of what is stored; B: four 8 x 8 tiles
        row = 16 * selector + G + 8 * (i % 2)
        registers[f"a{i}"] = pairs(stored, row, 2 * T + 8 * (i // 2))
        registers[f"b{i}"] = pairs(x, G, 8 * i + 2 * T)
    found = run(f"{NAME.format(kind)} {REGISTERS}, e, {selector};", registers)
    result = np.zeros((16, 8), np.float32)
    for i in range(4):
        result[G + 8 * (i // 2), 2 * T + i % 2] = found[f"d{i}"].view(np.float32)[0]
    expected = weight[16 * selector : 16 * selector + 16].double() @ x.double().t()
    assert np.array_equal(result, expected.float().numpy())
