"""Target and Kernel: what a machine can do, as data.

A target is a tuple of kernels. A packed node goes to the fastest of those that accept it and, under
the guard, win. The kernels themselves live in codegen/; nothing here knows them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch._ops import OpOverload

from sparsefx.convolutions import ConvKernel


@dataclass(frozen=True)
class LinearSpec:
    """All that a kernel may know about a packed linear before it is built.

    `layout` is "nm", "bitmap" or "block" (`n`, `m` are 0 but for nm, `block` is (0, 0) but for
    block); `density` is the share of stored values; `dtype` that of x, bias and result. `rows` is
    the number of rows of x (the product of its leading sizes) at the example input, `rows_vary`
    whether other calls may bring other numbers; `epilogue` as in epilogue.py.

    `values` says how weights are stored: "" in `dtype`; "int8", "int4", "fp8" as codes with a scale
    for each `group` input columns of a row (0: for the whole row; block: for each block), which a
    kernel multiplies out in registers; "int8_dynamic" as int8 with x quantised row by row as well.
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
    block: tuple[int, int] = (0, 0)
    values: str = ""
    group: int = 0


LINEAR_SCHEMA = (
    "linear(Tensor x, Tensor[] packed, Tensor? bias, Tensor[] extras, str handle, int features)"
    " -> Tensor"
)
"""Schema of the one operator by which a target's kernels of packed linears are called."""


@dataclass(frozen=True)
class Lowering:
    """How a graph calls a built kernel.

    The node becomes `op(x, packed, bias, extras, handle, features)` (LINEAR_SCHEMA) where `packed`
    are the (perhaps re-arranged) stored tensors, `bias` a Tensor or None, `extras` the operands of
    the epilogue, and `handle` the text that names the built kernel, stable over processes. Result:
    [..., features], contiguous, x's dtype. `text` is the generated source, `path` where it lies.
    The kernel takes only x whose number of rows is a multiple of `multiple`.
    """

    op: OpOverload
    packed: tuple[Tensor, ...]
    handle: str
    features: int
    text: str
    path: str
    multiple: int = 1

    def run(
        self,
        x: Tensor,
        bias: Tensor | None = None,
        extras: Sequence[Tensor] = (),
        packed: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Calls the kernel on x [..., in]; `packed` takes the place of its own stored tensors."""
        stored = list(self.packed if packed is None else packed)
        result: Tensor = self.op(x, stored, bias, list(extras), self.handle, self.features)
        return result


Inspect = Callable[[Sequence[tuple[LinearSpec, Lowering]]], list[str]]
"""Compiles kernels side by side before they are timed -> for each why it is not worth it, or ""."""


Announce = Callable[[], None]
"""Tells Inductor, before it compiles, how to call a target's operators."""


def by_dispatcher() -> None:
    """The `Announce` of operators that are called as any other."""


def no_objections(asked: Sequence[tuple[LinearSpec, Lowering]]) -> list[str]:
    """The `Inspect` of kernels that lowering has compiled already."""
    return [""] * len(asked)


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
        """The storage it reads: "nm", "bitmap" or "block"."""
        ...

    def accepts(self, spec: LinearSpec) -> str | None:
        """None for yes, or the reason for no."""
        ...

    def lower(self, spec: LinearSpec, packed: tuple[Tensor, ...]) -> Lowering:
        """Generates, builds and caches the kernel. Raises KernelBuildFailed."""
        ...

    def tunings(self, spec: LinearSpec) -> "tuple[Kernel, ...]":
        """The ways to run an accepted `spec` that are worth timing, best guess first, at most 8."""
        ...


@dataclass(frozen=True)
class Target:
    """A kind of device: its name, the torch device type, its kernels, best guesses first.

    `kernels` compute packed linears, `attention` sparse attentions, `convolutions` those with
    sparse weights. `roofline`: which entry of devices.py plans for it; "" takes the device at hand.
    `inspect` has the last word on which kernels of packed linears are timed; `announce` is called
    before Inductor compiles a graph.
    """

    name: str
    device: str
    kernels: tuple[Kernel, ...]
    roofline: str = ""
    attention: tuple[AttentionKernel, ...] = ()
    convolutions: tuple[ConvKernel, ...] = ()
    inspect: Inspect = no_objections
    announce: Announce = by_dispatcher

    def present(self) -> bool:
        """Whether this process can run on it."""
        return self.device == "cpu" or torch.cuda.is_available()
