"""Generated C++ block-sparse linears against the meaning of the dialect op in float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparsefx import ops
from sparsefx.codegen.cpp import CppLinear, isa
from sparsefx.epilogue import features, parse
from sparsefx.errors import DtypeMismatch, ShapeMismatch
from sparsefx.formats import pack_block
from sparsefx.target import LinearSpec

ISAS = [each.name for each in isa.LINEAR_ISAS if each.present()]
BOUND = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}
# Of few rows, of registers of rows, of both, of more than a batch.
ROWS = (0, 1, 3, 16, 33, 50, 100, 300)


class Case:
    """A random block-sparse linear, its lowering and its meaning."""

    def __init__(
        self,
        block: tuple[int, int],
        dtype: torch.dtype,
        isa_name: str | None,
        epilogue: str = "",
        blocks: tuple[int, int] = (9, 13),
    ) -> None:
        self.random = torch.Generator().manual_seed(5)
        self.block, self.dtype, self.epilogue = block, dtype, epilogue
        self.out, self.width = block[0] * blocks[0], block[1] * blocks[1]
        keep = torch.rand(blocks, generator=self.random) < 0.4
        keep[1] = False  # an empty row of blocks
        keep = keep.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        self.packed = pack_block(self.tensor(self.out, self.width) * keep, *block)
        self.bias = self.tensor(self.out) if epilogue else None
        self.spec = LinearSpec(
            "block", self.out, self.width, 0, 0, 0.4, dtype, bool(epilogue), epilogue,
            rows=1, rows_vary=True, block=block,
        )  # fmt: skip
        kernel = CppLinear("block", isa_name)
        assert kernel.accepts(self.spec) is None
        self.lowering = kernel.lower(self.spec, self.packed)

    def tensor(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random).to(self.dtype)

    def check(self, x: Tensor) -> None:
        width = features(self.out, self.epilogue)
        binary = [step for step in parse(self.epilogue) if step.op in ("add", "mul")]
        extras = [self.tensor(*x.shape[:-1], width) for _ in binary]
        got = self.lowering.run(x, self.bias, extras)
        values, columns, row_ptr = self.packed
        bias = None if self.bias is None else self.bias.double()
        wide = [extra.double() for extra in extras]
        want = ops.block_linear(
            x.double(), values.double(), columns, row_ptr, bias, *self.block, self.epilogue, wide
        )
        assert got.shape == want.shape and got.dtype is self.dtype
        if want.numel():
            error = (got.double() - want).abs().max() / want.abs().max()
            assert error <= BOUND[self.dtype], (self.spec, x.shape, error)


@pytest.mark.parametrize("isa_name", ISAS)
@pytest.mark.parametrize(
    ("block", "dtype"),
    [
        ((16, 16), torch.float32),
        ((64, 32), torch.bfloat16),
        ((1, 16), torch.float32),
        ((6, 12), torch.float16),
        ((3, 5), torch.bfloat16),
    ],
    ids=str,
)
def test_every_row_count(block: tuple[int, int], dtype: torch.dtype, isa_name: str) -> None:
    case = Case(block, dtype, isa_name)
    for rows in ROWS:
        case.check(case.tensor(rows, case.width))


@pytest.mark.parametrize("epilogue", ["silu;mul 0;add 1", "gate_gelu;add 0"])
def test_epilogues(epilogue: str) -> None:
    case = Case((8, 16), torch.float32, None, epilogue)
    for rows in (2, 40):
        case.check(case.tensor(rows, case.width))
    case.check(case.tensor(2, 3, case.width))
    case.check(case.tensor(case.width, 5).t())


def test_more_columns_than_a_tile_and_more_rows_than_a_band() -> None:
    case = Case((48, 24), torch.float32, None, blocks=(13, 90))
    case.check(case.tensor(70, case.width))


def test_refuses_what_would_read_out_of_bounds() -> None:
    case = Case((16, 16), torch.float32, None)
    low, (values, columns, row_ptr) = case.lowering, case.packed
    x = case.tensor(2, case.width)

    def run(x: Tensor, *packed: Tensor) -> Tensor:
        return low.op(x, packed, None, [], low.handle, low.features)

    with pytest.raises(DtypeMismatch, match="x is torch.float16"):
        run(x.half(), values, columns, row_ptr)
    with pytest.raises(DtypeMismatch, match="columns is torch.int64"):
        run(x, values, columns.long(), row_ptr)
    with pytest.raises(ShapeMismatch, match="x has shape"):
        run(x[:, 1:], values, columns, row_ptr)
    with pytest.raises(ShapeMismatch, match="values has shape"):
        run(x, values[1:], columns, row_ptr)
    with pytest.raises(ShapeMismatch, match="row_ptr has shape"):
        run(x, values, columns, row_ptr[1:])
    with pytest.raises(ShapeMismatch, match="bias=False and 0 extras"):
        low.op(x, case.packed, None, [x], low.handle, low.features)


def test_accepts_or_says_why() -> None:
    kernel, spec = CppLinear("block"), Case((1, 16), torch.float32, None).spec
    assert "not of int8" in str(kernel.accepts(replace(spec, values="int8")))
    assert "part gates" in str(kernel.accepts(replace(spec, epilogue="gate_relu")))
