"""Where a graph uses the weights that are asked for, and how the input is read there as rows."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from sparsefx.calibrate.rows import ExpertRows, LinearRows, PatchRows, Rows
from sparsefx.rewrite import arguments

aten = torch.ops.aten

# operator -> (position of the input, of the weight; which axis of the weight the input meets)
_LINEARS = {
    aten.linear.default: (0, 1, 1),
    aten.addmm.default: (1, 2, 0),
    aten.matmul.default: (0, 1, 0),
    aten.mm.default: (0, 1, 0),
}
_CONVOLUTIONS = frozenset({aten.conv2d.default, aten.conv2d.padding})
_REVERSED = frozenset({aten.t.default, aten.numpy_T.default})
_SAME_WEIGHT = frozenset(
    {
        *(aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.alias.default),
        *(aten.detach.default, aten.contiguous.default),
    }
)
_SAME_ROWS = frozenset({aten.to.dtype, aten.to.dtype_layout})
_PRODUCTS_OF_EXPERTS = ("transformers.grouped_mm_fallback.default", "aten._grouped_mm.default")


# Encoder-decoders shift labels to the right where no tokens are given.
_DECODED = frozenset({"decoder_input_ids", "decoder_inputs_embeds", "labels"})

Sources = tuple[fx.Node, ...]
"""The nodes whose values `Rows` take, the input first."""


@dataclass(frozen=True)
class Use:
    """One layer at work: `node` applies the weight `parameter` to `rows` of the `sources`."""

    parameter: str
    node: fx.Node
    sources: Sources
    rows: Rows


def mark_input_axes(gm: fx.GraphModule, axes: Mapping[str, int]) -> None:
    """Notes at the nodes of the weights in `axes` which dimension of each, as stored, is the input.

    The other way round a matrix is not the layer that was asked for: a decoder that is tied to an
    encoder reads its weight transposed.
    """
    for node in gm.graph.find_nodes(op="get_attr"):
        if str(node.target) in axes:
            node.meta[_INPUT_AXIS] = axes[str(node.target)]


def layer_uses(gm: fx.GraphModule, asked: Mapping[str, str]) -> list[Use]:
    """Every use as a layer of the weights in `asked` (any of its names -> name), in graph order.

    The input of a weight that nothing is noted at is its last dimension.
    """
    found = []
    for weight in gm.graph.find_nodes(op="get_attr"):
        if (parameter := asked.get(str(weight.target))) is not None:
            found += list(_uses(parameter, weight, weight, tuple(range(weight.meta["val"].dim()))))
    order = {node: number for number, node in enumerate(gm.graph.nodes)}
    decoded = _decoded(gm.graph)
    placed = (_in_decoder(use) if use.sources[0] in decoded else use for use in found)
    return sorted(placed, key=lambda use: order[use.node])


def _decoded(graph: fx.Graph) -> set[fx.Node]:
    """What depends on the tokens that a decoder behind an encoder is given."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        is_given = node.op == "placeholder" and node.name in _DECODED
        if is_given or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _in_decoder(use: Use) -> Use:
    if isinstance(use.rows, PatchRows):
        return use
    return replace(use, rows=replace(use.rows, in_decoder=True))


_INPUT_AXIS = "sparsefx_input_axis"


def _uses(parameter: str, weight: fx.Node, form: fx.Node, axes: tuple[int, ...]) -> Iterator[Use]:
    """axes: of the weight, in the order in which `form` has them."""
    given = weight.meta.get(_INPUT_AXIS, len(axes) - 1)
    for user in form.users:
        if user.target in _LINEARS:
            first, second, meets = _LINEARS[user.target]
            source, place = arguments(user)[first], arguments(user)[second]
            is_layer = place is form and len(axes) == len(("out", "in")) and axes[meets] == given
            if is_layer and isinstance(source, fx.Node) and source is not form:
                yield Use(parameter, user, (source,), LinearRows())
        elif user.target in _CONVOLUTIONS and arguments(user)[1] is weight:
            source = arguments(user)[0]
            assert isinstance(source, fx.Node)
            yield Use(parameter, user, (source,), _patches(user, weight))
        elif (product := _product_of_experts(user)) is not None:
            x, stack, ends = product
            if stack is form and axes[:2] == (0, given):
                yield _use_of_experts(parameter, user, x, ends)
        elif (moved := _moved(user, axes)) is not None:
            yield from _uses(parameter, weight, user, moved)


def _moved(node: fx.Node, axes: tuple[int, ...]) -> tuple[int, ...] | None:
    """The axes of what a node makes of a weight with these; None where it makes something else."""
    if node.target in _SAME_WEIGHT:
        return axes
    if node.target in _REVERSED:
        return axes[::-1]
    if node.target is aten.permute.default:
        _, order = arguments(node)
        assert isinstance(order, list | tuple)
        return tuple(axes[place] for place in order if isinstance(place, int))
    if node.target is aten.transpose.int:
        _, first, second = arguments(node)
        assert isinstance(first, int) and isinstance(second, int)
        swapped = list(axes)
        swapped[first], swapped[second] = axes[second], axes[first]
        return tuple(swapped)
    return None


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
