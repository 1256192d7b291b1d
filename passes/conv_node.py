"""A convolution of a graph, read: what it computes and why no kernel may have it."""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sparsefx.candidates import is_constant
from sparsefx.convolutions import ConvSpec
from sparsefx.shapes import hint, varies

aten = torch.ops.aten

_TWO_D = frozenset({torch.conv2d, aten.conv2d.default, aten.conv2d.padding})
_DEFAULTS: dict[str, object] = {
    "input": None,
    "weight": None,
    "bias": None,
    "stride": 1,
    "padding": 0,
    "dilation": 1,
    "groups": 1,
}


@dataclass(frozen=True)
class ConvNode:
    """A convolution of a graph; its properties are those of a 2-d one that `refusal` lets pass."""

    node: fx.Node
    arguments: dict[str, object]

    @classmethod
    def read(cls, node: fx.Node) -> "ConvNode":
        """The node with its arguments by name."""
        given = dict(zip(_DEFAULTS, node.args, strict=False))
        return cls(node, {**_DEFAULTS, **given, **node.kwargs})

    def refusal(self) -> str | None:
        """Why no kernel of a 2-d convolution with a constant weight may have this node."""
        if self.node.target not in _TWO_D:
            return "only 2-d ones have sparse kernels, and none that are transposed"
        if self.arguments["groups"] != 1:
            return "depthwise and other grouped ones have no sparse kernel"
        source = self.arguments["weight"]
        if not isinstance(source, fx.Node) or not is_constant(source):
            return "the weight is computed or changed in the graph"
        return self._unlike() or self._unready()

    def _unlike(self) -> str | None:
        if _pair(self.arguments["dilation"]) != (1, 1):
            return "dilated ones have no sparse kernel"
        strides, paddings = self.stride, self.padding
        if len({*strides}) > 1 or len({*paddings}) > 1 or paddings[0] < 0:
            return "its stride or padding differs between the axes"
        if self.x.meta["val"].dim() != len(("batch", "in", "height", "width")):
            return "its input has no batch dimension"
        return None

    def _unready(self) -> str | None:
        if any(varies(size) for size in self.x.meta["val"].shape[1:]):
            return "the sizes of images vary between calls"
        dtypes = {self.x.meta["val"].dtype, self.node.meta["val"].dtype, self.weight.dtype}
        if self.bias is not None:
            dtypes.add(self.bias.meta["val"].dtype)
        if len(dtypes) > 1:
            return "input, weight, bias and result are not of one type"
        if self.weight.is_inference():
            return "torch counts no changes of a weight made in inference mode"
        return None

    @property
    def x(self) -> fx.Node:
        """The node of its input [batch, in, height, width]."""
        x = self.arguments["input"]
        assert isinstance(x, fx.Node)
        return x

    @property
    def weight_node(self) -> fx.Node:
        """The node of its weight."""
        weight = self.arguments["weight"]
        assert isinstance(weight, fx.Node)
        return weight

    @property
    def weight(self) -> Tensor:
        """Its weight [out, in, rows, columns] as the parameter holds it."""
        value = self.weight_node.meta["val"]
        assert isinstance(value, Tensor)
        return value

    @property
    def bias(self) -> fx.Node | None:
        """The node of its bias [out]."""
        return self.arguments["bias"]  # type: ignore[return-value]  # a tensor or None

    @property
    def bias_value(self) -> Tensor | None:
        """Its bias, or one that takes as long to add: zeros where the graph computes it."""
        if self.bias is None:
            return None
        value: Tensor = self.bias.meta["val"]
        is_given = self.bias.op == "get_attr"
        return value.detach() if is_given else torch.zeros(len(self.weight), dtype=value.dtype)

    @property
    def window(self) -> tuple[int, int]:
        """Rows and columns of its weight."""
        return self.weight.shape[2], self.weight.shape[3]

    @property
    def stride(self) -> tuple[int, int]:
        """Down and across."""
        return _pair(self.arguments["stride"])

    @property
    def padding(self) -> tuple[int, int]:
        """Above and below, left and right; (-1, -1) where both sides differ."""
        padding = self.arguments["padding"]
        if padding == "valid":
            return 0, 0
        if padding == "same":
            rows, columns = self.window
            is_odd = rows % 2 and columns % 2
            return ((rows - 1) // 2, (columns - 1) // 2) if is_odd else (-1, -1)
        return _pair(padding)

    @property
    def batch_varies(self) -> bool:
        """Whether other calls may bring other numbers of images."""
        return varies(self.x.meta["val"].shape[0])

    @property
    def gives_channels_last(self) -> bool:
        """Whether channels lie side by side in the dense result (and not in contiguous planes)."""
        value = self.node.meta["val"]
        channels, plane = value.shape[1], value.shape[2] * value.shape[3]
        return bool(channels > 1 and plane > 1 and value.stride(1) == 1)

    @property
    def text(self) -> str:
        """Sizes for the report, as "64x32x3x3/2 @ 1x56x56": weight, stride, images."""
        images = self._images
        stride = f"/{self.stride[0]}" if self.stride[0] > 1 else ""
        batch = f"{images[0]}{'..' if self.batch_varies else ''}"
        sizes = "x".join(str(size) for size in self.weight.shape)
        return f"{sizes}{stride} @ {batch}x{images[1]}x{images[2]}"

    @property
    def _images(self) -> tuple[int, int, int]:
        batch, _, height, width = (hint(size) for size in self.x.meta["val"].shape)
        return batch, height, width

    def spec(self, density: float) -> ConvSpec:
        """What kernels may know of it."""
        batch, height, width = self._images
        out, in_ = self.weight.shape[:2]
        return ConvSpec(
            out_channels=out,
            in_channels=in_,
            window=self.window,
            stride=self.stride[0],
            padding=self.padding[0],
            density=density,
            dtype=self.weight.dtype,
            batch=batch,
            height=height,
            width=width,
        )


def _pair(value: object) -> tuple[int, int]:
    """Two numbers, or one for both."""
    if isinstance(value, int):
        return value, value
    numbers = [int(each) for each in value]  # type: ignore[attr-defined]  # as conv2d takes it
    return numbers[0], numbers[-1]
