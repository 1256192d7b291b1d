"""Calls past the dispatcher: which of them need no Python, and how Inductor's code makes them."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsefx
from sparsefx.by_rows import Dense, Route, Routes
from sparsefx.codegen.cpp import direct, operator
from tests.cpp_halves import needs_python
from tests.test_cpp_by_rows import OUT, WIDTH, x_of
from tests.test_cpp_kernels import Case
from tests.test_cpp_operator import BROKEN, KINDS, MISTAKES, UNUSUAL, plain


@pytest.mark.parametrize("kind", KINDS)
def test_takes_every_kind_of_kernel(kind: str) -> None:
    given = KINDS[kind]()
    assert torch.equal(given.by_direct(), given.by_python())
    assert not needs_python(given.by_direct)


@pytest.mark.parametrize("what", UNUSUAL)
def test_leaves_strided_tensors_to_python(what: str) -> None:
    given = UNUSUAL[what](plain(0.5, torch.float32, "mul 0"))
    assert needs_python(given.by_direct)
    assert torch.equal(given.by_direct(), given.by_python())


@pytest.mark.parametrize("what", [each for each in BROKEN if "size" not in each])
def test_mistakes_are_those_of_the_operator(what: str) -> None:
    broken = BROKEN[what](plain(0.5, torch.float32, "mul 0"))
    with pytest.raises(MISTAKES):
        broken.by_direct()


def test_a_result_of_another_kind_is_python_s() -> None:
    given = plain((2, 4))
    run = direct.function("linear")
    arguments = (given.x, *given.packed, given.handle, 2, False, False)
    for out in (torch.empty(6, 3).t(), torch.empty(3, 6, dtype=torch.float64)):
        assert needs_python(lambda out=out: run(*arguments, out=out))
        torch.testing.assert_close(out, given.by_python(), check_dtype=False)
    with pytest.raises(RuntimeError):
        run(*arguments, out=torch.empty(4, 6))


class Subclass(Tensor):
    pass


def test_subclasses_are_python_s() -> None:
    given = plain((2, 4))
    odd = replace(given, x=given.x.as_subclass(Subclass))
    assert needs_python(odd.by_direct)


def test_texts_that_are_equal_name_the_same() -> None:
    """They are found by address: a new text at an address that another had is not taken for it."""
    made = [plain((2, 4), torch.float32, f"scale {number}.5") for number in range(3)]
    wants = [given.by_python() for given in made]
    for _ in range(50):
        for given, want in zip(made, wants, strict=True):
            again = replace(given, handle="".join(list(given.handle)))
            assert torch.equal(again.by_direct(), want)


def by_rows(
    x: Tensor, packed: list[Tensor], weight: Tensor | None, bias: Tensor | None, routes: Routes
) -> Tensor:
    out = torch.full((*x.shape[:-1], OUT), float("nan"), dtype=x.dtype)
    named = [each for each in (weight, bias) if each is not None]
    counts = (len(packed), weight is not None, bias is not None)
    direct.function("by_rows")(x, *packed, *named, str(routes), *counts, out=out)
    return out


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_ranges(is_transposed: bool, has_bias: bool, dtype: torch.dtype) -> None:
    case = Case((2, 4), dtype, OUT, WIDTH, None)
    weight, bias = case.tensor(OUT, WIDTH), case.tensor(OUT) if has_bias else None
    stored = weight.t().contiguous() if is_transposed else weight
    routes = Routes((Route(1, ()),), Dense(is_transposed))
    for shape in ((5, WIDTH), (2, 2, WIDTH), (2, 0, WIDTH), (1, 1, 4, WIDTH)):
        x = x_of(*shape).to(dtype)
        run = lambda x=x: by_rows(x, [], stored, bias, routes)  # type: ignore[misc]  # noqa: E731
        assert not needs_python(run)
        torch.testing.assert_close(run(), F.linear(x, weight, bias), rtol=2e-2, atol=1e-3)


def test_dense_weights_that_do_not_fit_are_python_s() -> None:
    weight = x_of(WIDTH, OUT).t()
    routes = Routes((Route(1, ()),))
    x = x_of(4, WIDTH)
    assert needs_python(lambda: by_rows(x, [], weight, None, routes))
    torch.testing.assert_close(by_rows(x, [], weight, None, routes), F.linear(x, weight))
    with pytest.raises(RuntimeError):
        by_rows(x, [], x_of(OUT, WIDTH + 8), None, routes)


def test_where_there_is_no_c_half(monkeypatch: pytest.MonkeyPatch) -> None:
    other = operator.Operator()
    other._refused = True
    monkeypatch.setattr(direct, "OPERATOR", other)
    assert direct.function("linear") is direct.linear
    given = plain((2, 4), torch.float32, "add 0")
    assert torch.equal(given.by_direct(), given.by_python())


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x * 2)))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    recipe = sparsefx.Recipe({"up*": sparsefx.NM(2, 4), "down*": sparsefx.Unstructured(0.8)})
    return sparsefx.sparsify(TwoLayers().eval(), recipe, progress=False)


def generated(fast: Callable[[Tensor], Tensor], x: Tensor) -> str:
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    return "\n".join(run_and_get_code(fast, x)[1])


@torch.no_grad()
def test_inductor_s_code(model: nn.Module) -> None:
    """It writes into memory that Inductor has planned, for any number of rows."""
    fast = sparsefx.compile(model, guard="off", dynamic=True)
    code = generated(fast, torch.randn(3, 64))
    assert code.count("sparsefx_linear(") + code.count("sparsefx_by_rows(") >= 2
    assert "torch.ops.sparsefx_" not in code
    for shape in ((3, 64), (1, 64), (40, 64)):
        x = torch.randn(*shape)
        torch.testing.assert_close(fast(x), model(x))
    assert not needs_python(lambda: fast(torch.randn(3, 64)))
    strided = torch.randn(3, 128)[:, ::2]
    torch.testing.assert_close(fast(strided), model(strided))
