"""Loads a generated attention kernel; imports Triton, so it is imported at first use.

A kernel has a function in `samples` that plans its launches on placeholders, which is how it is
compiled ahead of time.
"""

import functools
from dataclasses import dataclass
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from sparsefx.attention.operands import check_shape
from sparsefx.codegen.triton import loader
from sparsefx.codegen.triton.attention import emit
from sparsefx.codegen.triton.attention.emit import Constants
from sparsefx.codegen.triton.attention.variant import AttentionVariant


@dataclass(frozen=True)
class Loaded:
    """A generated module and the constants that go with its kernels."""

    variant: AttentionVariant
    module: ModuleType
    constants: Constants


@dataclass(frozen=True)
class Sample:
    """Operands of a call: shapes, strides and dtypes, no memory."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    is_causal: bool
    scale: float
    window: int

    @classmethod
    def of(cls, variant: AttentionVariant, batch: int, queries: int, keys: int) -> "Sample":
        """Two KV heads, laid out as models do: [batch, length, heads, dim], heads transposed."""

        def heads(number: int, length: int) -> Tensor:
            shape = (batch, length, number, variant.head_dim)
            return torch.empty(shape, dtype=variant.dtype, device="meta").transpose(1, 2)

        dtype = torch.bool if variant.mask == "bool" else variant.dtype
        seen = torch.empty(batch, 1, queries, keys, dtype=dtype, device="meta")
        mask = None if variant.mask == "none" else seen
        window = 4096 if variant.is_windowed else 0
        q, k, v = heads(2 * variant.group, queries), heads(2, keys), heads(2, keys)
        return cls(q, k, v, mask, variant.is_causal, variant.head_dim**-0.5, window)


@functools.cache
def load(handle: str) -> Loaded:
    """The kernel that `handle` names, generated if the cache folder lacks it; loaded once.

    Raises InvalidHandle.
    """
    variant = AttentionVariant.parse(handle)
    path, _ = emit.write(variant)
    module = loader.import_file(str(path))
    return Loaded(variant, module, cast(Constants, module.CONSTANTS))


def head_factors(factor: Tensor, q: Tensor) -> Tensor:
    """The factors as kernels read them, float32 side by side. Raises ShapeMismatch."""
    check_shape("factor", factor, (q.shape[1],))
    return factor.float().contiguous()


def rows_contiguous(x: Tensor) -> Tensor:
    """x itself if its last dimension is contiguous, as kernels need it; else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()
