"""The table of the normal form: what becomes an overload, and what must not be touched."""

import operator
from collections.abc import Callable
from inspect import signature

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from sparsefx.normalise import normalise

aten = torch.ops.aten


def captured(function: Callable[..., object], *args: Tensor) -> fx.GraphModule:
    """The graph that Dynamo hands to a backend, as it is."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, inputs: object) -> fx.GraphModule:
        graphs.append(gm)
        return gm

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=keep, fullgraph=True, dynamic=True)(*args)
    return graphs[0]


def x_of(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


X, W, CUBE, IMAGE = x_of(4, 4), x_of(4, 4) + 1, x_of(2, 4, 4), x_of(1, 2, 6, 6)
BIAS, KERNEL = x_of(4), x_of(2, 2, 3, 3)

TABLE: dict[str, tuple[Callable[..., object], tuple[Tensor, ...], object]] = {
    "F.linear": (lambda x, w: F.linear(x, w), (X, W), aten.linear.default),
    "F.linear by name": (
        lambda x, w, b: F.linear(input=x, weight=w, bias=b),
        (X, W, BIAS),
        aten.linear.default,
    ),
    "torch.addmm": (lambda x, w, b: torch.addmm(b, x, w), (X, W, BIAS), aten.addmm.default),
    "torch.addmm by name": (
        lambda x, w, b: torch.addmm(b, mat1=x, mat2=w, beta=2),
        (X, W, BIAS),
        aten.addmm.default,
    ),
    "torch.matmul": (lambda x, w: torch.matmul(x, w), (X, W), aten.matmul.default),
    "@": (lambda x, w: x @ w, (X, W), aten.matmul.default),
    "Tensor.matmul": (lambda x, w: x.matmul(w), (X, W), aten.matmul.default),
    "torch.mm": (lambda x, w: torch.mm(x, w), (X, W), aten.mm.default),
    "Tensor.mm": (lambda x, w: x.mm(w), (X, W), aten.mm.default),
    "attention": (
        lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
        (CUBE,),
        aten.scaled_dot_product_attention.default,
    ),
    "attention by name": (
        lambda x: F.scaled_dot_product_attention(query=x, key=x, value=x, scale=0.5),
        (CUBE,),
        aten.scaled_dot_product_attention.default,
    ),
    "torch.softmax": (lambda x: torch.softmax(x, dim=-1), (X,), aten.softmax.int),
    "F.softmax": (
        lambda x: F.softmax(x, dim=-1, dtype=torch.float64),
        (X,),
        aten.softmax.int,
    ),
    "Tensor.softmax": (lambda x: x.softmax(-1), (X,), aten.softmax.int),
    "F.relu": (lambda x: F.relu(x), (X,), aten.relu.default),
    "F.relu, not in place": (lambda x: F.relu(x, inplace=False), (X,), aten.relu.default),
    "torch.relu": (lambda x: torch.relu(x), (X,), aten.relu.default),
    "Tensor.relu": (lambda x: x.relu(), (X,), aten.relu.default),
    "F.silu": (lambda x: F.silu(x), (X,), aten.silu.default),
    "F.gelu": (lambda x: F.gelu(x, approximate="tanh"), (X,), aten.gelu.default),
    "+": (lambda x, w: x + w, (X, W), aten.add.Tensor),
    "+ a number": (lambda x: x + 2, (X,), aten.add.Tensor),
    "torch.add": (lambda x, w: torch.add(x, w, alpha=2), (X, W), aten.add.Tensor),
    "torch.add by name": (lambda x, w: torch.add(x, other=w), (X, W), aten.add.Tensor),
    "Tensor.add": (lambda x, w: x.add(w), (X, W), aten.add.Tensor),
    "*": (lambda x, w: x * w, (X, W), aten.mul.Tensor),
    "torch.mul": (lambda x: torch.mul(x, 0.5), (X,), aten.mul.Tensor),
    "Tensor.mul": (lambda x, w: x.mul(w), (X, W), aten.mul.Tensor),
    "/": (lambda x, w: x / w, (X, W), aten.div.Tensor),
    "torch.div": (lambda x: torch.div(x, 4), (X,), aten.div.Tensor),
    "Tensor.div": (lambda x, w: x.div(w), (X, W), aten.div.Tensor),
}


@pytest.mark.parametrize("name", TABLE)
def test_becomes_an_overload(name: str) -> None:
    function, args, overload = TABLE[name]
    gm = normalise(captured(function, *args))
    targets = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    assert overload in targets
    assert all("val" in node.meta for node in gm.graph.nodes if node.op != "output")
    torch.testing.assert_close(run(gm, function, args), function(*args))


def run(gm: fx.GraphModule, function: Callable[..., object], args: tuple[Tensor, ...]) -> object:
    """Runs a Dynamo graph, whose inputs are sizes and l_x_ for the argument x."""
    given = {
        f"l_{name}_": arg for name, arg in zip(signature(function).parameters, args, strict=True)
    }
    values = [
        given[node.name] if node.name in given else int(node.meta["val"].node.hint)
        for node in gm.graph.find_nodes(op="placeholder")
    ]
    return gm(*values)[0]


def sized(x: Tensor) -> Tensor:
    length = x.shape[0]
    return x.new_zeros(length * 2 + length, x.shape[1] + 1)


KEPT: dict[str, tuple[Callable[..., object], tuple[Tensor, ...]]] = {
    "in place by name": (lambda x: F.relu(x.clone(), inplace=True), (X,)),
    "in place by position": (lambda x: F.silu(x.clone(), True), (X,)),
    "a method in place": (lambda x: x.clone().add_(1), (X,)),
    "+=": (lambda x: operator.iadd(x.clone(), 1), (X,)),
    "out=": (lambda x: torch.add(x, 1, out=torch.empty(4, 4)), (X,)),
    "arithmetic on sizes": (sized, (X,)),
    "a number first": (lambda x: 2 * x, (X,)),
    "a number over a tensor": (lambda x: 2 / (x * x + 1), (X,)),
    "a size as operand": (lambda x: x * x.shape[0], (X,)),
    "rounding division": (lambda x: torch.div(x, 2, rounding_mode="floor"), (X,)),
    "a convolution with a number for its strides": (
        lambda x, w: F.conv2d(x, w, stride=2, padding=(1, 1)),
        (IMAGE, KERNEL),
    ),
    "padding by name": (lambda x, w: F.conv2d(x, w, padding="same"), (IMAGE, KERNEL)),
    "padding by name and position": (
        lambda x, w: F.conv2d(x, w, None, 1, "valid"),
        (IMAGE, KERNEL),
    ),
    "softmax with the depth of its warning": (lambda x: F.softmax(x, -1, 3), (X,)),
}


@pytest.mark.parametrize("name", KEPT)
def test_stays_as_it_was_captured(name: str) -> None:
    function, args = KEPT[name]
    gm = captured(function, *args)
    last = gm.graph.output_node().all_input_nodes[0]
    before = (last.op, last.target, last.args, last.kwargs)
    normalise(gm)
    assert (last.op, last.target, last.args, last.kwargs) == before
    torch.testing.assert_close(run(gm, function, args), function(*args))


def test_normalising_twice_changes_nothing() -> None:
    gm = normalise(captured(lambda x, w: F.softmax(F.gelu(x @ w) / 2, dim=-1), X, W))
    before = gm.code
    assert normalise(gm).code == before
