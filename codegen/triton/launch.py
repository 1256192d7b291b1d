"""Loads a generated kernel and launches it; imports Triton, so it is imported at first use."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import cast

import torch
from torch import Tensor
from triton import cdiv

from sparsefx.codegen.triton import emit, loader
from sparsefx.codegen.triton.loader import Call
from sparsefx.codegen.triton.variant import Variant
from sparsefx.errors import DtypeMismatch
from sparsefx.ops import linear_output


@dataclass(frozen=True)
class Loaded:
    """A generated module and the constants that go with its kernel."""

    variant: Variant
    module: ModuleType
    constants: dict[str, int]


@dataclass(frozen=True)
class Tile:
    """Sizes of one program: weight rows x rows of x, columns a step; warps; pipeline stages."""

    out: int
    rows: int
    columns: int
    warps: int
    stages: int = 3


@functools.cache
def load(handle: str) -> Loaded:
    """The kernel that `handle` names, generated if the cache folder lacks it; loaded once.

    Raises InvalidHandle.
    """
    variant = Variant.parse(handle)
    path, _ = emit.write(variant)
    module = loader.import_file(str(path))
    return Loaded(variant, module, cast(dict[str, int], module.CONSTANTS))


def tile_for(dtype: torch.dtype, rows: int, slots: int = 1) -> Tile:
    """Sizes that no device of the ahead-of-time tests spills registers with.

    `slots`: values of a group that are expanded at once, which is what takes registers.

    The weight tile is the tall side of the tensor cores (64 rows or more: wgmma), x the narrow one.
    fp32 runs without tensor cores (`input_precision="ieee"`) and gets small tiles.
    """
    if dtype == torch.float32:
        return Tile(out=64, rows=16 if rows <= 16 else 32, columns=32, warps=4)
    if rows <= 32 or slots > 8:
        return Tile(out=64, rows=16 if rows <= 16 else 32, columns=64, warps=4)
    return Tile(out=128, rows=64, columns=64, warps=8)


def plan(
    loaded: Loaded,
    x: Tensor,
    packed: Sequence[Tensor],
    bias: Tensor | None,
    extras: Sequence[Tensor],
    y: Tensor,
) -> Call:
    """The launch that computes y [rows, out] from x [rows, in], all contiguous."""
    rows, in_features = x.shape
    out_features = y.shape[1]
    tile = tile_for(loaded.variant.dtype, rows, loaded.constants.get("SLOTS", 1))
    options: dict[str, int | str] = {
        **loaded.constants,
        "BLOCK_OUT": tile.out,
        "BLOCK_ROWS": tile.rows,
        "BLOCK_IN": tile.columns,
        "EVEN": in_features % tile.columns == 0,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    sizes = (rows, out_features, in_features)
    arguments = (x, *packed, bias, tuple(extras), y, *sizes)
    return Call((cdiv(out_features, tile.out), cdiv(rows, tile.rows)), arguments, options)


def linear(
    handle: str,
    x: Tensor,
    packed: Sequence[Tensor],
    out_features: int,
    bias: Tensor | None,
    extras: Sequence[Tensor],
) -> Tensor:
    """Runs the kernel: epilogue(x W^T + bias), [..., out], contiguous, in x's dtype.

    Raises InvalidHandle, DtypeMismatch, or KernelBuildFailed where Triton refuses the kernel on
    this device.
    """
    loaded = load(handle)
    _check_dtype(loaded.variant.dtype, x, packed[0])
    y = linear_output(x, out_features)
    if not y.numel():
        return y
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    dense_extras = [extra.contiguous() for extra in extras]
    call = plan(loaded, flat, packed, bias, dense_extras, y.view(-1, out_features))
    loader.run(handle, loaded.module, call, x)
    return y


def _check_dtype(needed: torch.dtype, x: Tensor, values: Tensor) -> None:
    for name, tensor in (("x", x), ("the stored weight", values)):
        if tensor.dtype != needed:
            raise DtypeMismatch(name=name, dtype=tensor.dtype, needed=needed)
