"""Target and Kernel: what a machine can do, as data.

A target is an ordered tuple of kernels. A packed node goes to the first kernel that accepts it and,
under the guard, wins. The kernels themselves live in codegen/; nothing here knows them.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch._ops import OpOverload


@dataclass(frozen=True)
class LinearSpec:
    """All that a kernel may know about a packed linear before it is built.

    `layout` is "nm" or "bitmap" (`n`, `m` are 0 for bitmap); `density` is the share of stored
    values; `rows` is the number of rows of x (the product of its leading sizes) at the example
    input, `rows_vary` whether other calls may bring other numbers; `epilogue` as in epilogue.py.
    """

    layout: str
    out_features: int
    in_features: int
    n: int
    m: int
    density: float
    dtype: torch.dtype
    has_bias: bool
    epilogue: str
    rows: int
    rows_vary: bool


@dataclass(frozen=True)
class Lowering:
    """How a graph calls a built kernel.

    The node becomes `op(x, *packed, bias, extras, handle)` where `packed` are the (perhaps
    re-arranged) stored tensors, `bias` a Tensor or None, `extras` the operands of the epilogue, and
    `handle` the text that names the built kernel, stable over processes. Result: [..., out],
    contiguous, x's dtype. `text` is the generated source, `path` where it lies.
    """

    op: OpOverload
    packed: tuple[Tensor, ...]
    handle: str
    text: str
    path: str


class Kernel(Protocol):
    """One way to compute a packed linear on one kind of device."""

    @property
    def name(self) -> str:
        """Shown in reports; stable."""
        ...

    @property
    def layout(self) -> str:
        """The storage it reads: "nm" or "bitmap"."""
        ...

    def accepts(self, spec: LinearSpec) -> str | None:
        """None for yes, or the reason for no."""
        ...

    def lower(self, spec: LinearSpec, packed: tuple[Tensor, ...]) -> Lowering:
        """Generates, builds and caches the kernel. Raises KernelBuildFailed."""
        ...


@dataclass(frozen=True)
class Target:
    """A kind of device: its name, the torch device type, its kernels in order of preference.

    `roofline`: which entry of devices.py plans for it; "" takes the device at hand.
    """

    name: str
    device: str
    kernels: tuple[Kernel, ...]
    roofline: str = ""

    def present(self) -> bool:
        """Whether this process can run on it."""
        return self.device == "cpu" or torch.cuda.is_available()
