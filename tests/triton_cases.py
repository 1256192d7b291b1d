"""Packed linears for the tests of the Triton kernels, and their meaning in float64."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsefx import epilogue as epilogues
from sparsefx.codegen.triton import TritonLinear, launch, samples
from sparsefx.codegen.triton.variant import Settings, Variant
from sparsefx.epilogue import BINARY
from sparsefx.target import LinearSpec, Lowering
from tests.interp_bf16 import repaired
from tests.ptx_machine import running

SEED = 20


@dataclass(frozen=True)
class Case:
    """A lowered linear with its inputs; `weight` is what it stands for, dense."""

    spec: LinearSpec
    lowering: Lowering
    weight: Tensor
    x: Tensor
    bias: Tensor | None
    extras: tuple[Tensor, ...]

    def run(self) -> Tensor:
        """The result of the operator."""
        return self.lowering.run(self.x, self.bias, self.extras)

    def launched(self) -> Tensor:
        """The kernel's result, also where the operator would run the plain meaning on CPU."""
        lowering = self.lowering
        with running(), repaired():
            return launch.linear(
                lowering.handle,
                self.x,
                lowering.packed,
                lowering.features,
                self.bias,
                self.extras,
            )

    def meaning(self) -> Tensor:
        """What the dialect says, in float64."""
        acc = self.x.double() @ self.weight.double().t()
        if self.bias is not None:
            acc = acc + self.bias.double()
        extras = [extra.double() for extra in self.extras]
        return epilogues.apply(acc, self.spec.epilogue, extras)

    def check(self, result: Tensor) -> None:
        """Asserts that `result` is the meaning, rounded once to its dtype."""
        expected = self.meaning()
        assert result.dtype == self.x.dtype and result.is_contiguous()
        assert result.shape == expected.shape
        # float32 sums of at most 1024 products, then one rounding to the dtype
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


def make(
    spec: LinearSpec, shape: tuple[int, ...] = (), form: str = "", settings: Settings = ()
) -> Case:
    """Random weights of the spec's pattern, lowered, and x of `shape` (default [rows]) + [in].

    `form` names the kernel; "" is the one that has the name of the layout.
    """
    generator = torch.Generator().manual_seed(SEED)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(spec.dtype)

    leading = shape or (spec.rows,)
    kernel = TritonLinear(form or spec.layout, settings)
    weight = random(spec.out_features, spec.in_features)
    packed, weight = samples.canonical(Variant.of(kernel.form, spec), spec.layout, weight)
    assert kernel.accepts(spec) is None
    bias = random(spec.out_features) if spec.has_bias else None
    operands = [int(s.operand or 0) for s in epilogues.parse(spec.epilogue) if s.op in BINARY]
    lowering = kernel.lower(spec, packed)
    shapes = [(*leading, lowering.features)] * (max(operands, default=-1) + 1)
    extras = tuple(random(*each) for each in shapes)
    return Case(spec, lowering, weight, random(*leading, spec.in_features), bias, extras)


def with_rows(spec: LinearSpec, rows: int) -> LinearSpec:
    """The same spec at another number of rows."""
    return replace(spec, rows=rows)
