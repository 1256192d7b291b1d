"""Calls of packed linears from Inductor's generated code, past the dispatcher where C++ can.

A call names its tensors one by one and writes into `out`:

    linear(x, *tensors, handle, packed, has_weight, has_bias, out=out)
    by_rows(x, *tensors, routes, packed, has_weight, has_bias, out=out)

tensors: `packed` stored ones, the dense weight if there is one, the bias, operands of the epilogue.
The functions here are what templates/operator_direct.h leaves to Python.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sparsefx.codegen.cpp.operator import OPERATOR


class Given(NamedTuple):
    """The arguments of a call, taken apart."""

    x: Tensor
    stored: tuple[Tensor, ...]
    weight: Tensor | None
    bias: Tensor | None
    extras: tuple[Tensor, ...]
    text: str

    @classmethod
    def of(cls, arguments: tuple[Tensor | str | int, ...]) -> "Given":
        """In the order of the module's docstring."""
        x, *tensors = (each for each in arguments if isinstance(each, Tensor))
        text, packed, has_weight, has_bias = arguments[-4:]
        stored, rest = tensors[: int(packed)], tensors[int(packed) :]
        weight = rest.pop(0) if has_weight else None
        bias = rest.pop(0) if has_bias else None
        return cls(x, tuple(stored), weight, bias, tuple(rest), str(text))


def linear(*arguments: Tensor | str | int, out: Tensor) -> None:
    """sparsefx_cpp::linear into `out` [..., features]."""
    x, stored, _, bias, extras, handle = Given.of(arguments)
    operator = torch.ops.sparsefx_cpp.linear.default
    out.copy_(operator(x, stored, bias, extras, handle, out.shape[-1]))


def by_rows(*arguments: Tensor | str | int, out: Tensor) -> None:
    """sparsefx_rows::linear into `out` [..., features]."""
    x, stored, weight, bias, extras, routes = Given.of(arguments)
    operator = torch.ops.sparsefx_rows.linear.default
    out.copy_(operator(x, stored, weight, bias, extras, routes, out.shape[-1]))


def function(name: str) -> Callable[..., None]:
    """What generated code calls as `name`."""
    return OPERATOR.builtin(name, {"linear": linear, "by_rows": by_rows}[name])
