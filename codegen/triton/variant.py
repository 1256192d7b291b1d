"""What a generated kernel is specialised for, and the handle that says so."""

import math
import re
from dataclasses import dataclass

import torch

from sparsefx import epilogue as epilogues
from sparsefx.errors import InvalidHandle
from sparsefx.formats import NM_GROUPS
from sparsefx.target import LinearSpec

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_HEAD = re.compile(r"(?:nm (\d+):(\d+)|bitmap) (\w+) linear")
_ARROW = " -> "


@dataclass(frozen=True)
class Variant:
    """One generated kernel: `layout` "nm" or "bitmap" (n = m = 0), `dtype`, bias or not, epilogue.

    Shapes are not part of it: one kernel serves all shapes.
    """

    layout: str
    n: int
    m: int
    dtype: torch.dtype
    has_bias: bool
    steps: tuple[epilogues.Step, ...]

    @classmethod
    def of(cls, spec: LinearSpec) -> "Variant":
        """The variant that computes a node. Raises ValueError on an epilogue it cannot print."""
        steps = _steps(spec.epilogue)
        return cls(spec.layout, spec.n, spec.m, spec.dtype, spec.has_bias, steps)

    @classmethod
    def parse(cls, handle: str) -> "Variant":
        """Inverse of `handle`; raises InvalidHandle, so that only what we print is compiled."""
        head, *rest = handle.split(_ARROW)
        found = _HEAD.fullmatch(head)
        if found is None or found[3] not in DTYPES:
            raise InvalidHandle(handle=handle, rule=f"{head!r} names no layout and dtype")
        n, m = int(found[1] or 0), int(found[2] or 0)
        if found[1] and (m not in NM_GROUPS or not 0 < n < m):
            raise InvalidHandle(handle=handle, rule=f"there is no {n}:{m} layout")
        has_bias = rest[:1] == ["bias"]
        try:
            steps = _steps(";".join(rest[has_bias:]))
        except ValueError as error:
            raise InvalidHandle(handle=handle, rule=str(error)) from error
        return cls("nm" if found[1] else "bitmap", n, m, DTYPES[found[3]], has_bias, steps)

    @property
    def handle(self) -> str:
        """Names the kernel in any process: "nm 2:4 bfloat16 linear -> bias -> silu -> mul 0"."""
        pattern = f"nm {self.n}:{self.m}" if self.layout == "nm" else self.layout
        head = f"{pattern} {str(self.dtype).removeprefix('torch.')} linear"
        return _ARROW.join((head, *["bias"] * self.has_bias, *map(str, self.steps)))

    @property
    def epilogue(self) -> str:
        """The epilogue as `sparsefx.epilogue` text."""
        return epilogues.join(self.steps)


def _steps(epilogue: str) -> tuple[epilogues.Step, ...]:
    steps = epilogues.parse(epilogue)
    for step in steps:
        operand = step.operand or 0
        if not math.isfinite(operand) or (step.op in epilogues.BINARY and operand < 0):
            raise ValueError(f"epilogue step {str(step)!r} has no such operand")
    return steps
