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
Settings = tuple[tuple[str, int], ...]
_HEAD = re.compile(
    r"(?P<form>[a-z_]+)(?: (?P<n>\d+):(?P<m>\d+)| (?P<r>\d+)x(?P<c>\d+))?"
    r"(?: (?P<values>int8|int4|fp8)(?: group (?P<group>\d+))?)? (?P<dtype>\w+) linear"
    r"(?P<settings>(?: [a-z]+=\d+)*)"
)
_ARROW = " -> "


@dataclass(frozen=True)
class Variant:
    """One generated kernel.

    `form` names its template; n, m, block, dtype, values and group as in `LinearSpec`; then bias or
    not, and the epilogue. `settings` are how it is run, such as ("warps", 4): what they mean is the
    form's; those that are absent take the form's guess. Shapes are not part of it: one kernel
    serves all shapes.
    """

    form: str
    n: int
    m: int
    block: tuple[int, int]
    dtype: torch.dtype
    values: str
    group: int
    has_bias: bool
    steps: tuple[epilogues.Step, ...]
    settings: Settings = ()

    @classmethod
    def of(cls, form: str, spec: LinearSpec, settings: Settings = ()) -> "Variant":
        """The variant that computes a node. Raises ValueError on an epilogue it cannot print."""
        return cls(
            form=form,
            n=spec.n,
            m=spec.m,
            block=spec.block,
            dtype=spec.dtype,
            values=spec.values,
            group=spec.group,
            has_bias=spec.has_bias,
            steps=_steps(spec.epilogue),
            settings=settings,
        )

    @classmethod
    def parse(cls, handle: str) -> "Variant":
        """Inverse of `handle`; raises InvalidHandle, so that only what we print is compiled."""
        head, *rest = handle.split(_ARROW)
        found = _HEAD.fullmatch(head)
        if found is None or found["dtype"] not in DTYPES:
            raise InvalidHandle(handle=handle, rule=f"{head!r} names no layout and dtype")
        n, m = int(found["n"] or 0), int(found["m"] or 0)
        if found["n"] and (m not in NM_GROUPS or not 0 < n < m):
            raise InvalidHandle(handle=handle, rule=f"there is no {n}:{m} layout")
        has_bias = rest[:1] == ["bias"]
        try:
            steps = _steps(";".join(rest[has_bias:]))
        except ValueError as error:
            raise InvalidHandle(handle=handle, rule=str(error)) from error
        return cls(
            form=found["form"],
            n=n,
            m=m,
            block=(int(found["r"] or 0), int(found["c"] or 0)),
            dtype=DTYPES[found["dtype"]],
            values=found["values"] or "",
            group=int(found["group"] or 0),
            has_bias=has_bias,
            steps=steps,
            settings=_settings(found["settings"]),
        )

    @property
    def handle(self) -> str:
        """Names the kernel in any process: "nm 2:4 bfloat16 linear warps=8 -> bias -> silu"."""
        rows, columns = self.block
        words = [
            self.form,
            *[f"{self.n}:{self.m}"] * (self.m > 0),
            *[f"{rows}x{columns}"] * (rows > 0),
            *[self.values] * (self.values != ""),
            *[f"group {self.group}"] * (self.group > 0),
            f"{self.dtype_name} linear",
            *(f"{name}={value}" for name, value in self.settings),
        ]
        return _ARROW.join((" ".join(words), *["bias"] * self.has_bias, *map(str, self.steps)))

    @property
    def dtype_name(self) -> str:
        """Of x, bias and result: a key of DTYPES."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def epilogue(self) -> str:
        """The epilogue as `sparsefx.epilogue` text."""
        return epilogues.join(self.steps)

    @property
    def is_gated(self) -> bool:
        """Whether pairs of rows of W become one feature of the result."""
        return epilogues.is_gated(self.epilogue)

    def setting(self, name: str, guess: int) -> int:
        """The value of a setting, or `guess` where the handle does not say."""
        return dict(self.settings).get(name, guess)


def _settings(text: str) -> Settings:
    pairs = (word.split("=") for word in text.split())
    return tuple((name, int(value)) for name, value in pairs)


def _steps(epilogue: str) -> tuple[epilogues.Step, ...]:
    steps = epilogues.parse(epilogue)
    for step in steps:
        operand = step.operand or 0
        if not math.isfinite(operand) or (step.op in epilogues.BINARY and operand < 0):
            raise ValueError(f"epilogue step {str(step)!r} has no such operand")
    return steps
