"""Quantised dense products: the same numbers as their codes, told in the report, never a bar."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsefx import quantised_dense, timing
from sparsefx.api import plans
from sparsefx.passes.lower import Lower, no_baseline
from sparsefx.quantise import rounded
from sparsefx.quantised_dense import ERROR, Product, error, measure, products
from sparsefx.spec import NM
from sparsefx.target import LinearSpec
from tests.compilers import accept
from tests.guard_kernels import SPEC
from tests.pass_models import FUSED, Around, after, sparse, x_of
from tests.plain_target import plain

SHAPE = (48, 128)


def operands(dtype: torch.dtype, rows: int = 7, shape: tuple[int, int] = SHAPE) -> list[Tensor]:
    torch.manual_seed(3)
    return [torch.randn(rows, shape[1]).to(dtype), torch.randn(shape).to(dtype)]


WEIGHT_ONLY = 2e-2  # x and result in bfloat16
FOUND = {
    ("int8", torch.float32): {"int8 weights": WEIGHT_ONLY},
    ("int8", torch.bfloat16): {"int8 weights": WEIGHT_ONLY},
    ("int4", torch.float16): {"int4 weights": WEIGHT_ONLY},
    ("int4", torch.float32): {"int4 weights": WEIGHT_ONLY},
    ("int8_dynamic", torch.float32): {"int8 dynamic": 4e-2, "int8 weights": WEIGHT_ONLY},
    ("int8_dynamic", torch.bfloat16): {"int8 weights": WEIGHT_ONLY},
    ("fp8", torch.bfloat16): {"fp8": ERROR},
}


@pytest.mark.parametrize(("kind", "dtype"), FOUND)
@pytest.mark.parametrize("rows", [1, 7])
def test_they_compute_the_product_of_their_codes(kind: str, dtype: torch.dtype, rows: int) -> None:
    x, weight = operands(dtype, rows)
    found = {each.name: each for each in products(weight, kind, 64, x)}
    assert found.keys() == FOUND[kind, dtype].keys()
    for name, product in found.items():
        result = product.bound(product.operands)(x)
        assert result.dtype == dtype
        exact = x.double() @ product.weight.double().t()
        bound = FOUND[kind, dtype][name] * float(exact.abs().max())
        assert float((result.double() - exact).abs().max()) < bound
        step = 2 / (7 if kind == "int4" else 13)  # of codes; of fp8 ones, near the largest: 1/14
        assert float((product.weight - weight).abs().max()) < step * float(weight.abs().max())


def test_the_product_for_a_gpu_quantises_rows_of_x() -> None:
    x, weight = operands(torch.float32, rows=24)
    product = quantised_dense._int8_both(weight)
    assert product is not None
    assert error(product, x) < 3e-2


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("int8", (48, 100)), ("int4", (20, 128)), ("int4", (48, 80)), ("no such kind", SHAPE)],
)
def test_shapes_that_torch_does_not_take_have_none(
    kind: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    x, weight = operands(torch.bfloat16, shape=shape)
    assert list(products(weight, kind, 0, x)) == []
    spec = replace(SPEC, out_features=shape[0], in_features=shape[1], values=kind)
    assert measure(spec, weight, cache=tmp_path) is None


def wrong(product: Product) -> Product:
    return replace(product, bound=lambda copy: lambda x: 1.2 * product.bound(copy)(x))


def raising(product: Product) -> Product:
    return replace(product, bound=lambda copy: lambda x: x[:, 10_000:] @ product.weight)


@pytest.mark.parametrize("broken", [wrong, raising])
def test_one_that_is_wrong_or_fails_is_none(
    broken: Callable[[Product], Product], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = operands(torch.bfloat16)
    (good,) = products(weight, "int8", 0, x)
    table = {("cpu", "int8"): (lambda weight, group: broken(good),)}
    monkeypatch.setattr(quantised_dense, "_BUILDERS", table)
    assert list(products(weight, "int8", 0, x)) == []


def test_it_is_measured_once_for_a_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.01)
    _, weight = operands(torch.float32)
    spec = replace(SPEC, out_features=48, in_features=128, values="int8_dynamic")
    first = measure(spec, weight, cache=tmp_path)
    assert first is not None and first > 0
    monkeypatch.setattr(quantised_dense, "products", lambda *_: pytest.fail("measured again"))
    bitmap = replace(spec, layout="bitmap", n=0, m=0, density=0.1, epilogue="relu")
    assert measure(bitmap, weight, cache=tmp_path) == first


def test_the_report_has_it_where_values_are_quantised() -> None:
    asked: list[tuple[str, tuple[int, ...]]] = []

    def baseline(spec: LinearSpec, weight: Tensor) -> float:
        asked.append((spec.values, tuple(weight.shape)))
        return 310.0

    torch.manual_seed(0)
    coded, plain_values = (sparse(NM(2, 4), 32, 32) for _ in range(2))
    coded.weight.data = rounded(coded.weight.data, "int8", (1, 32))
    model = Around(lambda s, x: s.a(s.b(x)), a=coded, b=plain_values)
    lower = Lower(plain(), accept, baseline=baseline)  # type: ignore[arg-type]
    _, ctx, _ = after(model, (*FUSED, lower), x_of(3, 32))
    assert {row.name: row.quantised_us for row in ctx.rows.values()} == {"a": 310.0, "b": None}
    assert asked == [("int8", (32, 32))]


@pytest.mark.parametrize("guard", ["measure", "model", "off"])
def test_nothing_is_timed_unless_the_guard_measures(guard: str) -> None:
    baseline = plans._baseline(plans.Request(plain(), guard))  # type: ignore[arg-type]
    assert (baseline is no_baseline) == (guard != "measure")
