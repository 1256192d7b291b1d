"""Where a graph uses the weights that are asked for, and how the input is read there as rows."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from sparsefx.calibrate.rows import ExpertRows, LinearRows, PatchRows, Rows
from sparsefx.rewrite import arguments

aten = torch.ops.aten

# operator -> (position of the input, of the weight)
_LINEARS = {
    aten.linear.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.matmul.default: (0, 1),
    aten.mm.default: (0, 1),
}
_CONVOLUTIONS = frozenset({aten.conv2d.default, aten.conv2d.padding})
_SAME_WEIGHT = frozenset(
    {
        *(aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default),
        *(aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.alias.default),
        *(aten.detach.default, aten.contiguous.default),
    }
)
_SAME_ROWS = frozenset({aten.to.dtype, aten.to.dtype_layout})
_PRODUCTS_OF_EXPERTS = ("transformers.grouped_mm_fallback.default", "aten._grouped_mm.default")


Sources = tuple[fx.Node, ...]
"""The nodes whose values `Rows` take, the input first."""


@dataclass(frozen=True)
class Use:
    """One layer at work: `node` applies the weight `parameter` to `rows` of the `sources`."""

    parameter: str
    node: fx.Node
    sources: Sources
    rows: Rows


def layer_uses(gm: fx.GraphModule, asked: Mapping[str, str]) -> list[Use]:
    """Every use as a layer of the weights in `asked` (any of its names -> name), in graph order."""
    found = []
    for weight in gm.graph.find_nodes(op="get_attr"):
        if (parameter := asked.get(str(weight.target))) is not None:
            found += list(_uses(parameter, weight, weight))
    order = {node: number for number, node in enumerate(gm.graph.nodes)}
    return sorted(found, key=lambda use: order[use.node])


def _uses(parameter: str, weight: fx.Node, form: fx.Node) -> Iterator[Use]:
    is_stack = weight.meta["val"].dim() == len(("experts", "out", "in"))
    for user in form.users:
        if user.target in _LINEARS and not is_stack:
            source, place = (arguments(user)[position] for position in _LINEARS[user.target])
            if place is form and isinstance(source, fx.Node) and source is not form:
                yield Use(parameter, user, (source,), LinearRows())
        elif user.target in _CONVOLUTIONS and arguments(user)[1] is weight:
            source = arguments(user)[0]
            assert isinstance(source, fx.Node)
            yield Use(parameter, user, (source,), _patches(user, weight))
        elif (product := _product_of_experts(user)) is not None:
            x, stack, ends = product
            if stack is form:
                yield _use_of_experts(parameter, user, x, ends)
        elif user.target in _SAME_WEIGHT:
            yield from _uses(parameter, weight, user)


def _product_of_experts(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """Of rows [n, in], sorted by expert, a stack [experts, in, out], and where each one's rows end;
    None for another node."""
    # By name, as transformers' operator exists only where transformers was imported.
    if str(node.target) not in _PRODUCTS_OF_EXPERTS:
        return None
    x, stack, ends = arguments(node)[:3]
    if not (isinstance(x, fx.Node) and isinstance(stack, fx.Node) and isinstance(ends, fx.Node)):
        return None
    return (x, stack, ends) if (x.meta["val"].dim(), stack.meta["val"].dim()) == (2, 3) else None


def _use_of_experts(parameter: str, node: fx.Node, x: fx.Node, ends: fx.Node) -> Use:
    """The tokens are those of the gather before the first of the products that share their ends."""
    for user in ends.users:
        product = _product_of_experts(user)
        gather = None if product is None else product[0]
        while gather is not None and gather.target in _SAME_ROWS:
            gather = gather.all_input_nodes[0]
        if gather is None or gather.target is not aten.index.Tensor:
            continue
        of, places = gather.args
        if isinstance(of, fx.Node) and isinstance(places, list | tuple) and len(places) == 1:
            (place,) = places
            if isinstance(place, fx.Node):
                return Use(parameter, node, (x, ends, place), ExpertRows(of.meta["val"].shape[0]))
    return Use(parameter, node, (x, ends), ExpertRows())


def _patches(node: fx.Node, weight: fx.Node) -> PatchRows:
    _, _, _, stride, padding, dilation, groups = arguments(node)
    kernel = _pair(list(weight.meta["val"].shape[2:]))
    dilation, stride = _pair(dilation), _pair(stride)
    if padding == "same":  # stride is 1; an odd sum leaves the larger half behind
        sums = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        top, left = (each // 2 for each in sums)
        around = (left, sums[1] - left, top, sums[0] - top)
    else:
        high, wide = (0, 0) if padding == "valid" else _pair(padding)
        around = (wide, wide, high, high)
    assert isinstance(groups, int)
    return PatchRows(kernel, stride, around, dilation, groups)


def _pair(value: object) -> tuple[int, int]:
    """What a 2-d convolution takes: two numbers, or one for both."""
    numbers = list(value) if isinstance(value, list | tuple) else [value]
    first, last = numbers[0], numbers[-1]
    assert isinstance(first, int) and isinstance(last, int)
    return first, last
