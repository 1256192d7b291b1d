"""A table by rows on the CPU without Python: what it takes, all as by_rows.linear means it."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefx import by_rows
from sparsefx.by_rows import Dense, Pick, Route, Routes
from sparsefx.packing import Packing
from tests.cpp_halves import needs_python
from tests.plain_target import PlainNM
from tests.test_cpp_kernels import Case

OUT, WIDTH = 6, 32
OURS = "sparsefx_cpp::linear"
OPERATOR = torch.ops.sparsefx_rows.linear.default


@dataclass
class Table:
    """A bitmap up to 3 rows, 2:4 for even numbers of rows up to 7, else a dense weight."""

    packed: list[Tensor]
    weight: Tensor | None
    bias: Tensor
    routes: Routes

    def by_operator(self, x: Tensor) -> Tensor:
        result: Tensor = OPERATOR(*self._all(x))
        return result

    def by_python(self, x: Tensor) -> Tensor:
        return by_rows.linear(*self._all(x))

    def _all(
        self, x: Tensor
    ) -> tuple[Tensor, list[Tensor], Tensor | None, Tensor, list[Tensor], str, int]:
        return x, self.packed, self.weight, self.bias, [], self.text, OUT

    def __post_init__(self) -> None:
        self.text = str(self.routes)


@pytest.fixture
def table() -> Table:
    few = Case(0.5, torch.float32, OUT, WIDTH, None, bias=True)
    some = Case((2, 4), torch.float32, OUT, WIDTH, None, bias=True)
    first = Pick(OURS, few.lowering.handle, (0, 1, 2))
    second = Pick(OURS, some.lowering.handle, (3, 4), multiple=2)
    packed = [*few.lowering.packed, *some.lowering.packed]
    routes = Routes((Route(1, (first,)), Route(4, (second,)), Route(8, ())))
    return Table(packed, few.tensor(OUT, WIDTH), few.tensor(OUT), routes)


def x_of(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_takes_kernels_and_dense(table: Table) -> None:
    assert table.weight is not None
    stored = table.weight.t().contiguous()
    turned = replace(table, weight=stored, routes=replace(table.routes, dense=Dense(True)))
    for shape in ((1,), (3,), (4,), (5,), (2, 3), (7,), (8,), (2, 2, 25), (0,), ()):
        x = x_of(*shape, WIDTH)
        for each in (table, turned):
            got = each.by_operator(x)
            torch.testing.assert_close(got, each.by_python(x), rtol=0, atol=0)
            assert not needs_python(lambda each=each, x=x: each.by_operator(x))
        is_dense = x.shape[:-1].numel() in (5, 7, 8, 100)
        dense = F.linear(x, table.weight, table.bias)
        assert torch.allclose(got, dense, atol=1e-5) is is_dense or not got.numel()


def test_leaves_the_rest_to_python(table: Table) -> None:
    few, even, dense = x_of(2, WIDTH), x_of(4, WIDTH), x_of(9, WIDTH)
    strided = x_of(WIDTH, 2).t()
    assert needs_python(lambda: table.by_operator(strided))
    assert torch.equal(table.by_operator(strided), table.by_python(strided))
    first, second, third = table.routes.routes
    other = replace(second, picks=(Pick("sparsefx_plain::linear", "2|4|", (3, 4)),))
    packing = Packing("nm", n=2, m=4)
    stored = packing.pack(torch.ones(OUT, WIDTH) * torch.tensor([1.0, 1, 0, 0]).repeat(8))
    unpacked = Dense(packing=packing, tensors=(5, 6))
    table.packed += stored
    assert PlainNM().name == "plain_nm"  # registers its operator
    for routes, x in (
        (Routes((first, replace(other, first=3))), even),
        (Routes((first, third), unpacked), dense),
        (Routes((first, third), replace(unpacked, transposed=True)), dense),
    ):
        changed = replace(table, routes=routes)
        changed.packed = [*table.packed]
        if other.picks[0] in [pick for each in routes.routes for pick in each.picks]:
            changed.packed[3:5] = stored
        assert needs_python(lambda changed=changed, x=x: changed.by_operator(x))
        assert torch.equal(changed.by_operator(x), changed.by_python(x))
        assert not needs_python(lambda changed=changed: changed.by_operator(few))


def test_a_text_that_is_otherwise_is_left_to_python(table: Table) -> None:
    x, text, want = x_of(2, WIDTH), table.text, table.by_python(x_of(2, WIDTH))
    table.text = json.dumps(json.loads(text))  # the same with spaces
    assert needs_python(lambda: table.by_operator(x)) and torch.equal(table.by_operator(x), want)
    for broken in ("", "{", text[:40], text.replace('"multiple":1', '"multiple":0')):
        table.text = broken
        with pytest.raises((ValueError, ZeroDivisionError, KeyError)):
            table.by_operator(x)


def test_mistakes_are_those_that_python_tells(table: Table) -> None:
    for broken, x in (
        (replace(table, packed=table.packed[:2]), x_of(2, WIDTH)),
        (replace(table, packed=[table.packed[0].double(), *table.packed[1:]]), x_of(2, WIDTH)),
        (table, x_of(2, WIDTH).double()),
        (table, x_of(2, WIDTH - 8)),
        (table, x_of(9, WIDTH - 8)),
        (replace(table, weight=None), x_of(9, WIDTH)),
        (table, torch.tensor(1.0)),
    ):
        with pytest.raises(Exception) as told:  # noqa: PT011  # whatever Python raises
            broken.by_python(x)
        with pytest.raises(type(told.value)) as caught:
            broken.by_operator(x)
        assert type(caught.value) is type(told.value) and str(caught.value) == str(told.value)


def test_modes_of_torch(table: Table) -> None:
    torch._dynamo.reset()
    x = x_of(9, WIDTH)
    fast = torch.compile(lambda x: table.by_operator(x + 1), fullgraph=True, dynamic=True)
    for rows in (2, 6, 9):
        torch.testing.assert_close(fast(x[:rows]), table.by_python(x[:rows] + 1))
    assert not needs_python(lambda: fast(x))
    with torch.inference_mode():
        assert torch.equal(table.by_operator(x), table.by_python(x))
    assert table.by_operator(x.to("meta")).shape == (9, OUT)
    torch.library.opcheck(OPERATOR, table._all(x[:2]))
