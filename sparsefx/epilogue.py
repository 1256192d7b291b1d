"""The epilogue: the element-wise steps that a linear's output goes through before it is stored.

An epilogue is written as text, steps joined by ";", applied left to right to `acc = x W^T + bias`:

    relu | silu | gelu | gelu_tanh          activation
    scale <number>                          acc * number
    add <i> | mul <i>                       acc + extras[i], acc * extras[i], of acc's shape

Text, because it travels as one operator argument, names kernels, and reads the same everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("relu", "silu", "gelu", "gelu_tanh")
BINARY = ("add", "mul")


@dataclass(frozen=True)
class Step:
    """One step: its `op`, and its operand (an index into extras, a factor, or None)."""

    op: str
    operand: int | float | None = None

    def __str__(self) -> str:
        return self.op if self.operand is None else f"{self.op} {self.operand!r}"


def parse(epilogue: str) -> tuple[Step, ...]:
    """The steps of an epilogue text; "" has none. Raises ValueError on an unknown step."""
    return tuple(_step(part.strip()) for part in epilogue.split(";") if part.strip())


def join(steps: Sequence[Step]) -> str:
    """The text of a chain of steps; inverse of `parse`."""
    return ";".join(str(step) for step in steps)


def apply(acc: Tensor, epilogue: str, extras: Sequence[Tensor]) -> Tensor:
    """The meaning of an epilogue: `acc` [..., out] after all its steps, same shape and dtype."""
    for step in parse(epilogue):
        acc = _apply_step(acc, step, extras)
    return acc


def _step(text: str) -> Step:
    op, _, operand = text.partition(" ")
    if op in ACTIVATIONS and not operand:
        return Step(op)
    if op in BINARY:
        return Step(op, int(operand))
    if op == "scale":
        return Step(op, float(operand))
    raise ValueError(f"epilogue step {text!r} is not one of {ACTIVATIONS + BINARY + ('scale',)}")


def _apply_step(acc: Tensor, step: Step, extras: Sequence[Tensor]) -> Tensor:
    match step.op:
        case "relu":
            return F.relu(acc)
        case "silu":
            return F.silu(acc)
        case "gelu":
            return F.gelu(acc)
        case "gelu_tanh":
            return F.gelu(acc, approximate="tanh")
        case "scale":
            return acc * float(step.operand or 0)
        case "add":
            return acc + extras[int(step.operand or 0)]
        case _:
            return acc * extras[int(step.operand or 0)]
