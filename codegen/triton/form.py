"""What a form is: one way to compute a packed linear, from stored tensors to launches.

A form is a template, how the canonical tensors of `sparsefx.formats` are re-arranged for it, and
which launches one call takes. It knows no device and does not import Triton.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from sparsefx.codegen.triton.variant import Settings, Variant
from sparsefx.target import LinearSpec

Packed = tuple[Tensor, ...]
POWERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Call:
    """All that a launch passes to Triton; `kernel` names the function of the generated module."""

    grid: tuple[int, ...]
    arguments: tuple[object, ...]
    options: dict[str, int | str]
    kernel: str = "kernel"


@dataclass(frozen=True)
class Problem:
    """One call: x [rows, in] and y [rows, features], contiguous; `out_features` rows of W."""

    x: Tensor
    packed: Packed
    bias: Tensor | None
    extras: Packed
    y: Tensor
    out_features: int

    @property
    def rows(self) -> int:
        """Rows of x."""
        return self.x.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of x."""
        return self.x.shape[1]

    def part(self, first: int, end: int) -> "Problem":
        """The same of some rows of x alone."""
        extras = tuple(extra.view(-1, extra.shape[-1])[first:end] for extra in self.extras)
        return replace(self, x=self.x[first:end], y=self.y[first:end], extras=extras)


class Form(Protocol):
    """One way to compute packed linears of one layout."""

    @property
    def name(self) -> str:
        """Of the form and of its template; first word of a handle."""
        ...

    @property
    def layout(self) -> str:
        """The canonical storage that it starts from."""
        ...

    @property
    def needs(self) -> str:
        """What of the hardware: "" or one of `hardware`'s names."""
        ...

    @property
    def interpretable(self) -> bool:
        """Whether Triton's interpreter can run it."""
        ...

    @property
    def settings(self) -> Mapping[str, tuple[int, ...]]:
        """What a handle may set, and to which values."""
        ...

    def misfit(self, spec: LinearSpec) -> str | None:
        """Why it cannot compute this linear, or None."""
        ...

    def tunings(self, spec: LinearSpec) -> tuple[Settings, ...]:
        """Settings that are worth timing, best guess first, at most 8."""
        ...

    def arrange(self, variant: Variant, packed: Packed, in_features: int) -> Packed:
        """The stored tensors from the canonical ones."""
        ...

    def weight(self, variant: Variant, packed: Packed, out: int, in_features: int) -> Tensor:
        """The dense weight [out, in_features] of the stored tensors, in the variant's dtype."""
        ...

    def text(self, variant: Variant) -> str:
        """What the generated module says after the template, "" or lines."""
        ...

    def calls(self, variant: Variant, problem: Problem) -> tuple[Call, ...]:
        """The launches that compute `problem.y`, in order."""
        ...


def finished(variant: Variant, problem: Problem, kernel: Call, split: int) -> tuple[Call, ...]:
    """`kernel`, which writes its last tensor argument `y`; with `split` > 1 it writes partial sums.

    The arguments of `kernel` up to rows are taken as (.., bias, extras, y): with split > 1, y is a
    float32 workspace [split, rows, out], and `finish_part.reduce` makes the result of it.
    """
    options: dict[str, int | str] = {"SPLIT": split, "GATED": int(variant.is_gated)}
    first = Call(kernel.grid, kernel.arguments, {**kernel.options, **options}, kernel.kernel)
    if split == 1:
        return (first,)
    rows, out = problem.rows, problem.out_features
    parts = torch.empty((split, rows, out), dtype=torch.float32, device=problem.x.device)
    replaced = tuple(parts if each is problem.y else each for each in first.arguments)
    out_block, row_block = (256, 1) if rows < 4 else (64, 4)
    arguments = (parts, problem.bias, problem.extras, problem.y, rows, out)
    sizes: dict[str, int | str] = {"OUT": out_block, "ROWS": row_block, "num_warps": 4}
    grid = (cdiv(out, out_block), cdiv(rows, row_block))
    return (
        Call(first.grid, replaced, first.options, first.kernel),
        Call(grid, arguments, {**options, **sizes}, "reduce"),
    )


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power(value: int, least: int, most: int) -> int:
    """The smallest power of two that is at least `value`, within [least, most] (powers too)."""
    return min(most, max(least, 1 << max(0, value - 1).bit_length()))
