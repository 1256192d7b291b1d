"""Which nodes of a graph sparsity could act on: linears, convolutions, attentions, experts."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator

from sparsefx.attributes import is_graph
from sparsefx.mutation import changed_in_graph
from sparsefx.rewrite import arguments
from sparsefx.shapes import bounds, hint, varies

aten = torch.ops.aten

# Dynamo's are not normalised: torch.conv2d takes a stride that is a number, or padding="same".
CONVOLUTIONS = frozenset(
    {
        *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
        *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
        *(torch.conv1d, torch.conv2d, torch.conv3d),
        *(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input),
        *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    }
)
# Several linears and an attention in one call, which Dynamo does not look into.
WHOLE_LAYERS = frozenset(
    {
        torch.nn.functional.multi_head_attention_forward,
        torch._native_multi_head_attention,
        torch._transformer_encoder_layer_fwd,
    }
)
ATTENTION = aten.scaled_dot_product_attention.default
# Of which one may be a linear, or a half of an attention, that no rule reads as such.
_PRODUCTS = frozenset(
    {
        *(aten.bmm.default, aten.baddbmm.default, aten.einsum.default, aten.inner.default),
        *(torch.bmm, torch.baddbmm, torch.einsum, torch.inner, torch.tensordot),
        *("bmm", "baddbmm", "inner"),
    }
)
_MATMULS = frozenset({aten.matmul.default, *_PRODUCTS})

# operator -> (position of the weight, whether it is stored [in, out])
_LINEARS = {
    aten.linear.default: (1, False),
    aten.addmm.default: (2, True),
    aten.matmul.default: (1, True),
    aten.mm.default: (1, True),
}


@dataclass(frozen=True)
class Candidate:
    """One candidate node.

    op: "linear", "conv", "attention", "experts" (a stack of weights, one parameter) or "layer"
    (linears inside one operator or a graph of their own: a branch, a checkpointed body); name: the
    module it comes from; weight: its get_attr node where it has a constant one; transposed: whether
    that weight is stored [in, out].
    """

    node: fx.Node
    op: str
    name: str
    weight: fx.Node | None = None
    transposed: bool = False


def candidates(gm: fx.GraphModule) -> Iterator[Candidate]:
    """The candidates of a normal-form graph, in graph order."""
    for node in gm.graph.nodes:
        if node.target in _LINEARS:
            yield from list(_linear(node)) or list(_experts(node)) or _product(node)
        elif node.target in CONVOLUTIONS:
            yield Candidate(node, "conv", module_path(node))
        elif node.target in WHOLE_LAYERS or _holds_linears(gm, node):
            yield Candidate(node, "layer", module_path(node))
        elif node.target is ATTENTION or is_flex(node):
            yield Candidate(node, "attention", attention_path(node))
        elif (product := _attending_product(node)) is not None:
            yield Candidate(node, "attention", attention_path(product))
        elif node.target in _PRODUCTS:
            yield from list(_experts(node)) or _product(node)
        else:
            yield from _experts(node)


def stored_weight(candidate: Candidate) -> Tensor:
    """The candidate's weight as [out, in]; a view, no copy."""
    assert candidate.weight is not None
    value = candidate.weight.meta["val"]
    assert isinstance(value, Tensor)
    return value.detach().t() if candidate.transposed else value.detach()


def parameter_name(weight: fx.Node) -> str:
    """The model's own name for a weight node; a pruned copy keeps the name of its original."""
    return str(weight.meta.get("sparsefx_parameter", weight.target))


def rows_of(x: fx.Node) -> tuple[int, bool]:
    """How many rows a linear's input has at the example (all sizes but the last), and whether
    other calls may bring another number. Never installs a shape guard."""
    sizes = x.meta["val"].shape[:-1]
    return math.prod(hint(size) for size in sizes), any(varies(size) for size in sizes)


def rows_between(x: fx.Node) -> tuple[int, int]:
    """The fewest and the most rows that calls may bring; a size without bound counts as 2^31."""
    sizes = [bounds(size) for size in x.meta["val"].shape[:-1]]
    return math.prod(least for least, _ in sizes), math.prod(most for _, most in sizes)


_ROOT = re.compile(r"^L\['\w+'\]")  # Dynamo's name for the variable that holds the model


def module_path(node: fx.Node) -> str:
    """Dotted path of the module that a node was traced from; the model itself: the node's name."""
    return _path(node) or node.name


def attention_path(node: fx.Node) -> str:
    """The same for an attention, which is found again by it: "attention" for the model itself."""
    return _path(node) or "attention"


def _path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    path = str(list(stack.values())[-1][0]) if stack else ""
    return _ROOT.sub("", path).replace("._orig_mod", "").lstrip(".")


def _linear(node: fx.Node) -> Iterator[Candidate]:
    position, transposed = _LINEARS[node.target]  # type: ignore[index]  # target is an overload here
    weight = arguments(node)[position]
    if isinstance(weight, fx.Node) and is_constant(weight) and weight.meta["val"].dim() == 2:
        yield Candidate(node, "linear", _layer_name(node, weight), weight, transposed)
    elif node.target is aten.linear.default:
        yield Candidate(node, "linear", module_path(node))


def _product(node: fx.Node) -> Iterator[Candidate]:
    """A product with a matrix of the model that is transposed, or on the left: x @ w.T, w @ x."""
    for factor in node.all_input_nodes:
        source = _origin(factor)
        if source is not None and not (source is factor and _is_bias(node, factor)):
            yield Candidate(node, "linear", parameter_name(source).removesuffix(".weight"))
            return


def _is_bias(node: fx.Node, factor: fx.Node) -> bool:
    return node.target is aten.addmm.default and arguments(node)[0] is factor


def _origin(factor: fx.Node) -> fx.Node | None:
    """The matrix that `factor` was made of and of nothing else, or None."""
    node = factor
    while node.op in ("call_function", "call_method") and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    value = node.meta.get("val")
    is_matrix = isinstance(value, nn.Parameter) and value.dim() == 2
    return node if node.op == "get_attr" and is_matrix else None


def is_constant(weight: fx.Node) -> bool:
    """Whether it is a tensor of the model that the graph leaves as it is."""
    return weight.op == "get_attr" and not changed_in_graph(weight)


def _experts(node: fx.Node) -> Iterator[Candidate]:
    if node.op == "output" or node.target in _ELEMENTWISE:
        return
    for source in node.all_input_nodes:
        value = source.meta.get("val")
        if source.op == "get_attr" and isinstance(value, nn.Parameter) and _is_stack(value):
            yield Candidate(node, "experts", parameter_name(source))


def _is_stack(value: Tensor) -> bool:
    """[experts, out, in]. A position embedding is [1, positions, width]."""
    return value.dim() == len(("experts", "out", "in")) and min(value.shape) > 1


_ELEMENTWISE = frozenset({aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor})


def _holds_linears(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a branch or a checkpointed body, which is a graph of its own, has linears."""
    if not isinstance(node.target, HigherOrderOperator):
        return False
    names = (str(source.target) for source in node.all_input_nodes if source.op == "get_attr")
    bodies = (gm.get_submodule(name) for name in names if is_graph(gm, name))
    linears = {*_LINEARS, torch.nn.functional.linear, torch._C._nn.linear}
    return any(
        inner.target in linears
        for body in bodies
        if isinstance(body, fx.GraphModule)
        for inner in body.graph.nodes
    )


def _layer_name(node: fx.Node, weight: fx.Node) -> str:
    """The parameter's owner if it lies in the module at work, else (tied weights) that module."""
    parameter, path = parameter_name(weight), module_path(node)
    if path == node.name or parameter.startswith(f"{path}."):
        return parameter.removesuffix(".weight")
    return path


def is_flex(node: fx.Node) -> bool:
    """Whether it calls flex_attention, an operator that takes its scores' change as a graph."""
    return isinstance(node.target, HigherOrderOperator) and node.target.name() == "flex_attention"


_STEPS_TO_MATMUL = 5


def _attending_product(node: fx.Node) -> fx.Node | None:
    """The product that a softmax goes into, if it also comes from one: an attention by hand."""
    if node.target is not aten.softmax.int or not _comes_from_matmul(node, _STEPS_TO_MATMUL):
        return None
    return _next_matmul(node, _STEPS_TO_MATMUL)


def _next_matmul(node: fx.Node, steps: int) -> fx.Node | None:
    if not steps:
        return None
    found = (u if u.target in _MATMULS else _next_matmul(u, steps - 1) for u in node.users)
    return next((product for product in found if product is not None), None)


def _comes_from_matmul(node: fx.Node, steps: int) -> bool:
    return steps > 0 and any(
        source.target in _MATMULS or _comes_from_matmul(source, steps - 1)
        for source in node.all_input_nodes
    )
