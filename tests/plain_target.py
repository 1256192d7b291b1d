"""A target whose kernels are plain PyTorch, so that lowering is tested on any machine."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefx import ops
from sparsefx.errors import KernelBuildFailed
from sparsefx.target import LINEAR_SCHEMA, LinearSpec, Lowering, Target

_LIBRARY = torch.library.Library("sparsefx_plain", "DEF")
_LIBRARY.define(LINEAR_SCHEMA)


def _linear(
    x: Tensor,
    packed: Sequence[Tensor],
    bias: Tensor | None,
    extras: Sequence[Tensor],
    handle: str,
    features: int,
) -> Tensor:
    n, m, epilogue, kind, group = [*handle.split("|"), "", "0"][:5]
    values, index, *scales = packed
    return ops.nm_linear(
        x,
        values,
        index,
        bias,
        int(n),
        int(m),
        epilogue,
        extras,
        scales=scales[0] if scales else None,
        kind=kind,
        group=int(group),
    )


_LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")


@dataclass(frozen=True)
class PlainNM:
    """Takes N:M; `refuses`: its reason for no; `fails`: whether building raises."""

    name: str = "plain_nm"
    layout: str = "nm"
    refuses: str | None = None
    fails: bool = False

    def accepts(self, spec: LinearSpec) -> str | None:
        return self.refuses

    def tunings(self, spec: LinearSpec) -> "tuple[PlainNM, ...]":
        return (self,)

    def lower(self, spec: LinearSpec, packed: tuple[Tensor, ...]) -> Lowering:
        if self.fails:
            raise KernelBuildFailed(kernel=self.name, rule="no compiler")
        handle = f"{spec.n}|{spec.m}|{spec.epilogue}"
        handle += f"|{spec.values}|{spec.group}" if spec.values else ""
        op = torch.ops.sparsefx_plain.linear.default
        return Lowering(op, packed, handle, spec.out_features, "", "")


def plain(*kernels: PlainNM) -> Target:
    return Target("plain", "cpu", kernels or (PlainNM(),))
