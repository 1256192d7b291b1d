"""The rows of a layer's input: one for each token, or each output pixel of a convolution.

`layer_uses` finds where a graph uses the weights that are asked for; a `Use` says from which node
the input comes and how it is read as rows in the column order of `PrunableWeight.matrix()`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

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
_CHUNK = 2**24  # elements of unfolded patches that exist at a time: 64 MiB


@dataclass(frozen=True)
class Tokens:
    """What the inputs of a batch say about its rows.

    samples: how many sequences or images; counted: bool [batch, length], False for padding, None
    where every row counts.
    """

    samples: int
    counted: Tensor | None = None

    def of(self, x: Tensor) -> Tensor:
        """x [..., features] as rows [n, features], without those of padding tokens."""
        rows = x.reshape(-1, x.shape[-1])
        if self.counted is None:
            return rows
        if x.shape[:-1] == self.counted.shape:
            return rows[self.counted.flatten()]
        # Some models (GPT-2) flatten [batch, length, features] before a linear.
        is_flat = x.dim() == 2 and x.shape[0] == self.counted.numel()
        return rows[self.counted.flatten()] if is_flat else rows


@dataclass(frozen=True)
class LinearRows:
    """The last axis of the input, as it is."""

    def __call__(self, x: Tensor, tokens: Tokens) -> Iterator[tuple[Tensor, int]]:
        """Rows [n, in] and of how many samples they are."""
        yield tokens.of(x), tokens.samples


@dataclass(frozen=True)
class PatchRows:
    """The patches that a 2-d convolution sees, [n, R * S * C], channels fastest.

    In a grouped convolution every group's patch is a row of its own: one statistic for all groups.
    """

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]  # left, right, top, bottom, as F.pad takes it
    dilation: tuple[int, int]
    groups: int

    def __call__(self, x: Tensor, tokens: Tokens) -> Iterator[tuple[Tensor, int]]:
        """Rows of a few samples at a time, and how many."""
        x = F.pad(x if x.dim() == 4 else x[None], self.padding).float()
        taps = self.kernel[0] * self.kernel[1]
        pixels = x[0].numel() // (self.stride[0] * self.stride[1])
        for part in x.split(max(1, _CHUNK // max(1, pixels * taps))):
            patches = F.unfold(part, self.kernel, self.dilation, 0, self.stride)
            grouped = patches.unflatten(1, (self.groups, -1, taps))  # [n, g, C / g, R * S, pixels]
            yield grouped.permute(0, 1, 4, 3, 2).flatten(3).flatten(0, 2), part.shape[0]


Rows = LinearRows | PatchRows


@dataclass(frozen=True)
class Use:
    """One layer at work: `node` applies the weight `parameter` to `rows` of the node `source`."""

    parameter: str
    node: fx.Node
    source: fx.Node
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
    for user in form.users:
        if user.target in _LINEARS:
            source, place = (arguments(user)[position] for position in _LINEARS[user.target])
            if place is form and isinstance(source, fx.Node) and source is not form:
                yield Use(parameter, user, source, LinearRows())
        elif user.target in _CONVOLUTIONS and arguments(user)[1] is weight:
            source = arguments(user)[0]
            assert isinstance(source, fx.Node)
            yield Use(parameter, user, source, _patches(user, weight))
        elif user.target in _SAME_WEIGHT:
            yield from _uses(parameter, weight, user)


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
