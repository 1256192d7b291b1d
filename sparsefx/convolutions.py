"""2-d convolutions with sparse weights: spec, storage, operator schema, protocol of kernels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch._ops import OpOverload

CONV_SCHEMA = (
    "conv2d(Tensor x, Tensor[] packed, Tensor? bias, int[] shape, int stride, int padding, "
    "bool channels_last, str handle) -> Tensor"
)
"""Schema of the one operator by which a target's kernels of convolutions are called.

`shape` is the weight's: [out, in, rows, columns].
"""


@dataclass(frozen=True)
class ConvSpec:
    """All that a kernel may know about a convolution with a sparse weight before it is built.

    `window` is the weight's (rows, columns); `stride` and `padding` hold for both axes; `density`
    is the share of weights that are not zero; `batch`, `height`, `width` are the input's sizes at
    the example.
    """

    out_channels: int
    in_channels: int
    window: tuple[int, int]
    stride: int
    padding: int
    density: float
    dtype: torch.dtype
    batch: int
    height: int
    width: int

    @property
    def pixels(self) -> int:
        """Of the result, in all images."""
        sizes = zip((self.height, self.width), self.window, strict=True)
        rows, columns = (result_size(size, k, self.stride, self.padding) for size, k in sizes)
        return self.batch * rows * columns

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the weight: [out, in, rows, columns]."""
        return (self.out_channels, self.in_channels, *self.window)

    @property
    def taps(self) -> int:
        """Weights of an output channel."""
        return self.in_channels * self.window[0] * self.window[1]


class Taps(NamedTuple):
    """A weight as kernels read it: of each output channel, the weights that are not zero.

    values float32 [kept]; columns int32 [kept]: places in the channel's weight, flattened in the
    order [in, rows, columns], ascending; row_ptr int32 [out + 1].
    """

    values: Tensor
    columns: Tensor
    row_ptr: Tensor


def pack_taps(weight: Tensor) -> Taps:
    """The taps of `weight` [out, in, rows, columns]; patterns of any kind are stored alike."""
    flat = weight.flatten(1)
    places = flat.nonzero()
    row_ptr = torch.zeros(len(flat) + 1, dtype=torch.int32, device=weight.device)
    row_ptr[1:] = (flat != 0).sum(1).cumsum(0)
    values = flat[places[:, 0], places[:, 1]].float()
    return Taps(values, places[:, 1].int(), row_ptr)


def result_size(size: int, window: int, stride: int, padding: int) -> int:
    """Rows (or columns) of a result, of those of the input."""
    return (size + 2 * padding - window) // stride + 1


def conv_output(
    x: Tensor, shape: Sequence[int], stride: int, padding: int, channels_last: bool
) -> Tensor:
    """An empty result [batch, out, rows, columns] for x [batch, in, height, width].

    shape: the weight's, [out, in, rows, columns].
    """
    rows, columns = (
        result_size(size, k, stride, padding)
        for size, k in zip(x.shape[2:], shape[2:], strict=True)
    )
    layout = torch.channels_last if channels_last else torch.contiguous_format
    sizes = (x.shape[0], shape[0], rows, columns)
    return torch.empty(sizes, dtype=x.dtype, device=x.device, memory_format=layout)


@dataclass(frozen=True)
class ConvLowering:
    """How a graph calls a built kernel: `op` (CONV_SCHEMA) with the `handle` that names it.

    `packed` of the call are Taps. x may lie in any way: contiguous and channels-last ones are read
    in place; the result is what `conv_output` says. `text` is the source, `path` where it lies.
    """

    op: OpOverload
    handle: str
    text: str
    path: str


class ConvKernel(Protocol):
    """One way to compute a convolution with a sparse weight on one kind of device."""

    @property
    def name(self) -> str:
        """Shown in reports; stable."""
        ...

    def accepts(self, spec: ConvSpec) -> str | None:
        """None for yes, or the reason for no."""
        ...

    def lower(self, spec: ConvSpec) -> ConvLowering:
        """Generates, builds and caches the kernel. Raises KernelBuildFailed."""
        ...
