"""Packed linears for the tests of the Triton kernels, and their meaning in float64."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsefx import epilogue as epilogues
from sparsefx import formats, ops
from sparsefx.codegen.triton import TritonLinear
from sparsefx.epilogue import BINARY
from sparsefx.spec import NM, Unstructured
from sparsefx.target import LinearSpec, Lowering

SEED = 20


@dataclass(frozen=True)
class Case:
    """A lowered linear with its inputs; `spec` says what it is."""

    spec: LinearSpec
    lowering: Lowering
    x: Tensor
    bias: Tensor | None
    extras: tuple[Tensor, ...]

    def run(self) -> Tensor:
        """The result of the generated kernel, through its operator."""
        return self.lowering.run(self.x, self.bias, self.extras)

    def meaning(self) -> Tensor:
        """What the dialect's operator says, in float64."""
        values, *rest = self.lowering.packed
        extras = [extra.double() for extra in self.extras]
        bias = None if self.bias is None else self.bias.double()
        x, values, spec = self.x.double(), values.double(), self.spec
        if spec.layout == "nm":
            return ops.nm_linear(x, values, rest[0], bias, spec.n, spec.m, spec.epilogue, extras)
        return ops.bitmap_linear(x, values, rest[0], rest[1], bias, spec.epilogue, extras)

    def check(self, result: Tensor) -> None:
        """Asserts that `result` is the meaning, rounded once to its dtype."""
        expected = self.meaning()
        assert result.dtype == self.x.dtype and result.is_contiguous()
        assert result.shape == expected.shape
        # float32 sums of at most 256 products, then one rounding to the dtype
        eps = torch.finfo(result.dtype).eps
        error = (result.double() - expected).abs().max() / expected.abs().max()
        assert error < eps / 2 + 1e-6, f"seed {SEED}: {self.lowering.handle}: {error:.2e}"


def linear_spec(
    pattern: str, dtype: torch.dtype, epilogue: str = "", bias: bool = True
) -> LinearSpec:
    """A spec of 40 ragged out features; `pattern` is "n:m" or "bitmap"."""
    if pattern == "bitmap":
        return LinearSpec("bitmap", 40, 77, 0, 0, 0.4, dtype, bias, epilogue, 7, True)
    n, m = map(int, pattern.split(":"))
    return LinearSpec("nm", 40, 96, n, m, n / m, dtype, bias, epilogue, 7, True)


def make(spec: LinearSpec, shape: tuple[int, ...] = ()) -> Case:
    """Random weights of the spec's pattern, lowered, and x of `shape` (default [rows]) + [in]."""
    generator = torch.Generator().manual_seed(SEED)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(spec.dtype)

    leading = shape or (spec.rows,)
    weight = random(spec.out_features, spec.in_features)
    pattern = NM(spec.n, spec.m) if spec.layout == "nm" else Unstructured(1 - spec.density)
    weight = weight * pattern.keep(weight.abs())
    if spec.layout == "nm":
        packed: tuple[Tensor, ...] = formats.pack_nm(weight, spec.n, spec.m)
    else:
        packed = formats.pack_bitmap(weight)
    kernel = TritonLinear(spec.layout)
    assert kernel.accepts(spec) is None
    bias = random(spec.out_features) if spec.has_bias else None
    operands = [int(s.operand or 0) for s in epilogues.parse(spec.epilogue) if s.op in BINARY]
    extras = [random(*leading, spec.out_features) for _ in range(max(operands, default=-1) + 1)]
    lowering = kernel.lower(spec, packed)
    return Case(spec, lowering, random(*leading, spec.in_features), bias, tuple(extras))


def with_rows(spec: LinearSpec, rows: int) -> LinearSpec:
    """The same spec at another number of rows."""
    return replace(spec, rows=rows)
