"""The epilogue: the element-wise steps that a linear's output goes through before it is stored.

An epilogue is written as text, steps joined by ";", applied left to right to `acc = x W^T + bias`:

    relu | silu | gelu | gelu_tanh          activation
    scale <number>                          acc * number
    add <i> | mul <i>                       acc + extras[i], acc * extras[i], of acc's shape
    gate_<activation>                       activation(acc[..., 2i]) * acc[..., 2i + 1], as column i

A gate is the first step or none, and the rows of W then alternate gate, up, gate, up, ...: the
result, and with it all extras, has half as many features as W has rows.

Text, because it travels as one operator argument, names kernels, and reads the same everywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("relu", "silu", "gelu", "gelu_tanh")
BINARY = ("add", "mul")
GATES = tuple(f"gate_{name}" for name in ACTIVATIONS)


@dataclass(frozen=True)
class Step:
    """One step: its `op`, and its operand (an index into extras, a factor, or None)."""

    op: str
    operand: int | float | None = None

    def __str__(self) -> str:
        return self.op if self.operand is None else f"{self.op} {self.operand!r}"


def parse(epilogue: str) -> tuple[Step, ...]:
    """The steps of an epilogue text; "" has none.

    Raises ValueError on an unknown step, and on a gate behind another step.
    """
    steps = tuple(_step(part.strip()) for part in epilogue.split(";") if part.strip())
    if any(step.op in GATES for step in steps[1:]):
        raise ValueError(f"epilogue {epilogue!r} has a gate behind another step")
    return steps


def is_gated(epilogue: str) -> bool:
    """Whether the first step is a gate, which halves the features."""
    return epilogue.lstrip().startswith(GATES)


def features(rows: int, epilogue: str) -> int:
    """The last size of the result of a linear whose weight has so many rows."""
    return rows // 2 if is_gated(epilogue) else rows


def join(steps: Sequence[Step]) -> str:
    """The text of a chain of steps; inverse of `parse`."""
    return ";".join(str(step) for step in steps)


def apply(acc: Tensor, epilogue: str, extras: Sequence[Tensor]) -> Tensor:
    """The meaning of an epilogue: `acc` [..., out] after all its steps, in the same dtype.

    Returns [..., features(out, epilogue)].
    """
    for step in parse(epilogue):
        acc = _apply_step(acc, step, extras)
    return acc


def _step(text: str) -> Step:
    op, _, operand = text.partition(" ")
    if op in ACTIVATIONS + GATES and not operand:
        return Step(op)
    if op in BINARY:
        return Step(op, int(operand))
    if op == "scale":
        return Step(op, float(operand))
    known = (*ACTIVATIONS, *GATES, *BINARY, "scale")
    raise ValueError(f"epilogue step {text!r} is not one of {known}")


def _apply_step(acc: Tensor, step: Step, extras: Sequence[Tensor]) -> Tensor:
    match step.op:
        case "scale":
            return acc * float(step.operand or 0)
        case "add":
            return acc + extras[int(step.operand or 0)]
        case "mul":
            return acc * extras[int(step.operand or 0)]
        case gate if gate in GATES:
            return _activated(acc[..., ::2], gate.removeprefix("gate_")) * acc[..., 1::2]
        case _:
            return _activated(acc, step.op)


def _activated(acc: Tensor, activation: str) -> Tensor:
    match activation:
        case "relu":
            return F.relu(acc)
        case "silu":
            return F.silu(acc)
        case "gelu":
            return F.gelu(acc)
        case _:
            return F.gelu(acc, approximate="tanh")
