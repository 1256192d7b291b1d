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


@dataclass(frozen=True)
class AttentionSpec:
    """All that a kernel may know about a sparse attention before it is built.

    `method` is "skip_softmax", "theta" or "block"; `phase` is "decode" where the graph has one
    query, else "prefill". `head_dim` is that of q, k and v; `mask` is "none", "bool" or "float".
    `tile` is (query rows, keys), (0, 0) for theta; `order` as in `SkipSoftmax`, "" otherwise.
    `options` are the method's other settings as text: placement, denominator and so on.
    `batch`, `queries`, `keys` are the sizes at the example input, `vary` whether other calls may
    bring others. `sparsity` is the share of tiles (theta: of elements) that the calibration data
    skipped in this phase, None if unknown.
    """

    method: str
    phase: str
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    mask: str
    is_causal: bool
    window: int
    tile: tuple[int, int]
    order: str
    options: tuple[str, ...]
    batch: int
    queries: int
    keys: int
    vary: bool
    sparsity: float | None


@dataclass(frozen=True)
class AttentionLowering:
    """How a graph calls a built attention kernel.

    `op` takes the arguments of the dialect operator (`attention.operators.SCHEMAS`), then
    `dense_below`, `calibrated` (`attention.route`) and `handle`, the text that names the built
    kernel, stable over processes. `text` is the generated source, `path` where it lies.
    """

    op: OpOverload
    handle: str
    text: str
    path: str


class AttentionKernel(Protocol):
    """One way to compute a sparse attention on one kind of device."""

    @property
    def name(self) -> str:
        """Shown in reports; stable."""
        ...

    @property
    def method(self) -> str:
        """The method it computes: "skip_softmax", "theta" or "block"."""
        ...

    def accepts(self, spec: AttentionSpec) -> str | None:
        """None for yes, or the reason for no."""
        ...

    def lower(self, spec: AttentionSpec) -> AttentionLowering:
        """Generates, builds and caches the kernel. Raises KernelBuildFailed."""
        ...


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

    `kernels` compute packed linears, `attention` sparse attentions. `roofline`: which entry of
    devices.py plans for it; "" takes the device at hand.
    """

    name: str
    device: str
    kernels: tuple[Kernel, ...]
    roofline: str = ""
    attention: tuple[AttentionKernel, ...] = ()

    def present(self) -> bool:
        """Whether this process can run on it."""
        return self.device == "cpu" or torch.cuda.is_available()
