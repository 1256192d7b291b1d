"""What a generated attention kernel is specialised for, and the handle that says so."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefx.attention.operands import check_operands
from sparsefx.codegen.triton.variant import DTYPES
from sparsefx.errors import InvalidHandle, ShapeMismatch
from sparsefx.target import AttentionSpec

MASKS = ("none", "bool", "float")
LARGEST_GROUP = 64  # query heads of a KV head in a kernel of one query; more spill registers
_HANDLE = re.compile(
    r"(?P<kernel>[a-z_]+) (?P<dtype>\w+) dim (?P<dim>\d+) group (?P<group>\d+) "
    r"tile (?P<rows>\d+)x(?P<keys>\d+) mask (?P<mask>\w+)"
    r"(?P<causal> causal)?(?P<windowed> windowed)?(?P<options>(?: [a-z_]+=[a-z0-9_]+)*)"
)


@dataclass(frozen=True)
class AttentionVariant:
    """One generated attention kernel.

    `kernel` names its template; `head_dim` is that of q, k and v; `group` how many query heads
    share a KV head; `tile` (query rows, keys) of one decision, (0, 0) where there are none; `mask`
    one of MASKS; `is_windowed` whether a sliding window is in force, whose size is an argument.
    `options` are the template's other constants, as ("name", "value"); see `emit`. Batch and
    lengths are not part of it: one kernel serves all.
    """

    kernel: str
    dtype: torch.dtype
    head_dim: int
    group: int
    tile: tuple[int, int]
    mask: str
    is_causal: bool
    is_windowed: bool
    options: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, kernel: str, spec: AttentionSpec, **options: str | int) -> "AttentionVariant":
        """The variant of `kernel` that computes a node; `options` in the order they are given."""
        return cls(
            kernel=kernel,
            dtype=spec.dtype,
            head_dim=spec.head_dim,
            group=spec.heads // spec.kv_heads,
            tile=spec.tile,
            mask=spec.mask,
            is_causal=spec.is_causal,
            is_windowed=spec.window > 0,
            options=tuple((name, str(value)) for name, value in options.items()),
        )

    @classmethod
    def parse(cls, handle: str) -> "AttentionVariant":
        """Inverse of `handle`; raises InvalidHandle, so that only what we print is compiled."""
        found = _HANDLE.fullmatch(handle)
        if found is None:
            raise InvalidHandle(handle=handle, rule="it is not written like an attention kernel's")
        if found["dtype"] not in DTYPES or found["mask"] not in MASKS:
            raise InvalidHandle(handle=handle, rule="no kernel has such a dtype or mask")
        pairs = (word.split("=") for word in found["options"].split())
        return cls(
            kernel=found["kernel"],
            dtype=DTYPES[found["dtype"]],
            head_dim=int(found["dim"]),
            group=int(found["group"]),
            tile=(int(found["rows"]), int(found["keys"])),
            mask=found["mask"],
            is_causal=found["causal"] is not None,
            is_windowed=found["windowed"] is not None,
            options=tuple((name, value) for name, value in pairs),
        )

    @property
    def handle(self) -> str:
        """Names the kernel in any process, for example:

        "skip_prefill bfloat16 dim 128 group 4 tile 128x64 mask none causal order=sink_diagonal".
        """
        rows, keys = self.tile
        dtype = str(self.dtype).removeprefix("torch.")
        words = [
            f"{self.kernel} {dtype} dim {self.head_dim} group {self.group}",
            f"tile {rows}x{keys} mask {self.mask}",
            *["causal"] * self.is_causal,
            *["windowed"] * self.is_windowed,
            *(f"{name}={value}" for name, value in self.options),
        ]
        return " ".join(words)

    def check(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, window: int
    ) -> None:
        """Raises unless the operands of a call are what the kernel was built for.

        DtypeMismatch, ShapeMismatch (`attention.operands`, and heads that share a KV head);
        InvalidHandle for a mask, a window or causality that the kernel does not have.
        """
        check_operands(q, k, v, mask, self.head_dim, self.dtype)
        if q.shape[1] != k.shape[1] * self.group:
            raise ShapeMismatch(
                name="k",
                shape=tuple(k.shape),
                rule=f"the kernel was built for {self.group} query heads to a KV head",
                remedy="Compile the model again",
            )
        kind = "none" if mask is None else "bool" if mask.dtype == torch.bool else "float"
        built = (self.mask, self.is_causal, self.is_windowed)
        if (kind, is_causal, window > 0) != built:
            raise InvalidHandle(handle=self.handle, rule="the call has another mask or window")
