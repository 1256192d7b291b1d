"""Calls of sparsefx_cpp::linear by each way in, and whether Python had a part in them."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType

import torch
from torch import Tensor

from sparsefx import by_rows
from sparsefx.codegen.cpp import call, direct
from sparsefx.ops import linear_output
from sparsefx.target import Lowering


@dataclass
class Given:
    """The arguments of a call."""

    x: Tensor
    packed: Sequence[Tensor]
    bias: Tensor | None
    extras: Sequence[Tensor]
    handle: str
    features: int

    @classmethod
    def of(
        cls, low: Lowering, x: Tensor, bias: Tensor | None = None, extras: Sequence[Tensor] = ()
    ) -> "Given":
        return cls(x, list(low.packed), bias, list(extras), low.handle, low.features)

    def by_operator(self) -> Tensor:
        """As a graph calls it: the C++ half if it can."""
        result: Tensor = torch.ops.sparsefx_cpp.linear.default(*self._all())
        return result

    def by_python(self) -> Tensor:
        return call.linear(*self._all())

    def by_direct(self) -> Tensor:
        """As Inductor's generated code calls it."""
        out = linear_output(self.x, self.features)
        bias = [] if self.bias is None else [self.bias]
        tensors = (self.x, *self.packed, *bias, *self.extras)
        run = direct.function("linear")
        run(*tensors, self.handle, len(self.packed), False, bool(bias), out=out)
        return out

    def _all(self) -> tuple[Tensor, Sequence[Tensor], Tensor | None, Sequence[Tensor], str, int]:
        return self.x, self.packed, self.bias, self.extras, self.handle, self.features


HALVES: tuple[Callable[[Given], Tensor], ...] = (
    Given.by_operator,
    Given.by_direct,
    Given.by_python,
)


_PYTHON = tuple(
    half.__code__ for half in (call.linear, by_rows.linear, direct.linear, direct.by_rows)
)


def needs_python(run: Callable[[], object]) -> bool:
    """Whether a Python half, also one of the table by rows, was entered while `run` ran."""
    entered = False

    def see(frame: FrameType, event: str, _: object) -> None:
        nonlocal entered
        entered |= event == "call" and frame.f_code in _PYTHON

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        run()
    finally:
        sys.setprofile(before)
    return entered
