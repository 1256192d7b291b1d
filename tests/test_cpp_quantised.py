"""Generated C++ kernels of quantised weights against the meaning of the dialect ops in float64."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from sparsefx import ops
from sparsefx.codegen.cpp import CppLinear, isa
from sparsefx.errors import DtypeMismatch, ShapeMismatch
from sparsefx.packing import Packing
from sparsefx.quantise import rounded
from sparsefx.spec import NM
from sparsefx.target import LinearSpec, Lowering

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
ROUNDING = {FLOAT: 2e-6, BF16: 8e-3, HALF: 1e-3}


@dataclass(frozen=True)
class Case:
    """A random quantised linear; `share` of its weights is kept where it is a bitmap."""

    packing: Packing
    dtype: torch.dtype
    share: float = 0.5
    width: int = 208
    epilogue: str = ""

    def spec(self, out: int = 7) -> LinearSpec:
        p = self.packing
        share = p.n / p.m if p.n else self.share
        return LinearSpec(
            p.layout, out, self.width, p.n, p.m, share, self.dtype, False, self.epilogue,
            rows=1, rows_vary=True, values=p.values, group=p.group,
        )  # fmt: skip

    def tensors(self, out: int = 7) -> tuple[Tensor, ...]:
        """The packed weight; one row keeps nothing, one all, where the layout lets it."""
        random = torch.Generator().manual_seed(5)
        weight = torch.randn(out, self.width, generator=random)
        if self.packing.n:
            keep = NM(self.packing.n, self.packing.m).keep(weight.abs())
        else:
            keep = torch.rand(weight.shape, generator=random) < self.share
            keep[1], keep[2] = False, True
        weight = (weight * keep).to(self.dtype)
        tile = self.packing.tile(self.width)
        return self.packing.pack(rounded(weight, self.packing.values, tile))

    def x(self, rows: int) -> Tensor:
        random = torch.Generator().manual_seed(rows)
        return torch.randn(rows, self.width, generator=random).to(self.dtype)

    def meaning(self, x: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        """In float64, but that x is rounded as float32 is."""
        p = self.packing
        *stored, scales = tensors
        tail = {"scales": scales.double(), "kind": p.values, "group": p.group}
        x = x.float() if p.values == "int8_dynamic" else x.double()
        if p.layout == "nm":
            return ops.nm_linear(x, *stored, None, p.n, p.m, self.epilogue, [], **tail).double()
        return ops.bitmap_linear(x, *stored, None, self.epilogue, [], **tail).double()

    def lower(self, isa_name: str | None, tensors: tuple[Tensor, ...]) -> Lowering:
        kernel = CppLinear(self.packing.layout, isa_name)
        assert kernel.accepts(self.spec()) is None, self
        return kernel.lower(self.spec(), tensors)


CASES = [
    Case(Packing("nm", n=2, m=4, values="int8_dynamic"), BF16),
    Case(Packing("bitmap", values="int8_dynamic", group=64), FLOAT, width=203, epilogue="relu"),
    Case(Packing("bitmap", values="int4"), BF16, width=203),
    Case(Packing("nm", n=2, m=4, values="int4", group=32), FLOAT),
    Case(Packing("nm", n=3, m=16, values="int4"), FLOAT),
    Case(Packing("bitmap", values="int4", group=64), FLOAT, 0.1, 203),
    Case(Packing("nm", n=4, m=8, values="int8", group=64), BF16),
    Case(Packing("bitmap", values="int8", group=16), HALF, 0.3, 203),
    Case(Packing("bitmap", values="int8"), FLOAT, 0.3, 203),
]
PRESENT = [each for each in isa.LINEAR_ISAS if each.present()]


def _distinct() -> list[tuple[Case, str]]:
    """Each case once where instruction sets share a text; some on those that differ by little."""
    found = {}
    for case, each in itertools.product(CASES, PRESENT):
        if each.name.startswith("avx512") or case in CASES[:4]:
            found.setdefault((case, each.block(case.spec())), each.name)
    return [(case, name) for (case, _), name in found.items()]


@pytest.mark.parametrize(("case", "isa_name"), _distinct(), ids=str)
def test_every_kind_of_values(case: Case, isa_name: str) -> None:
    tensors = case.tensors()
    low = case.lower(isa_name, tensors)
    for rows in (1, 3, 9, 67):
        x = case.x(rows)
        got, want = low.run(x, None, []), case.meaning(x, tensors)
        assert got.dtype == case.dtype
        bound = ROUNDING[case.dtype] * want.abs().max() + 1e-5
        assert (got.double() - want).abs().max() <= bound


@pytest.mark.parametrize("values", ["int8_dynamic", "int4"])
def test_nan_and_infinity_in_x_come_out_of_their_row(values: str) -> None:
    case = Case(Packing("nm", n=2, m=4, values=values), FLOAT)
    tensors = case.tensors()
    low, x = case.lower(None, tensors), case.x(4)
    x[1], x[2, 7], x[3] = float("nan"), float("inf"), 0
    got = low.run(x, None, [])
    assert got[1].isnan().all()
    assert not got[2].isfinite().all()
    assert not got[3].any()
    want = case.meaning(x[:1], tensors)
    torch.testing.assert_close(got[:1].double(), want, rtol=1e-5, atol=1e-5)


def test_an_empty_weight_and_no_rows() -> None:
    case = Case(Packing("bitmap", values="int4"), FLOAT, 0.5)
    values, bits, row_ptr, scales = case.tensors()
    low = case.lower("portable", (values, bits, row_ptr, scales))
    empty = (values[:0], bits.zero_(), row_ptr.zero_(), scales)
    assert not low.run(case.x(3), None, [], empty).any()
    assert low.run(case.x(0), None, [], empty).shape == (0, 7)


def test_refuses_scales_that_do_not_fit() -> None:
    case = Case(Packing("nm", n=2, m=4, values="int8", group=32), FLOAT)
    *stored, scales = case.tensors()
    low, x = case.lower("portable", (*stored, scales)), case.x(2)
    *keys, _ = low.packed
    with pytest.raises(ShapeMismatch, match="scales has shape"):
        low.run(x, None, [], (*keys, scales[:, 1:]))
    with pytest.raises(DtypeMismatch, match="scales is torch.float16"):
        low.run(x, None, [], (*keys, scales.half()))
    with pytest.raises(ShapeMismatch, match="the kernel reads values, keys, scales"):
        low.run(x, None, [], keys)
    with pytest.raises(DtypeMismatch, match="values is torch.float32"):
        low.run(x, None, [], (keys[0].float(), *keys[1:], scales))


def test_declines_what_it_cannot_read() -> None:
    spec = Case(Packing("nm", n=2, m=4, values="int8"), FLOAT).spec()
    kernel = CppLinear("nm")
    assert "not of fp8" in str(kernel.accepts(replace(spec, values="fp8")))
    assert "groups of 8 columns" in str(kernel.accepts(replace(spec, group=8)))
    long = replace(spec, values="int8_dynamic", in_features=1 << 17)
    assert "do not fit 32 bits" in str(kernel.accepts(long))
