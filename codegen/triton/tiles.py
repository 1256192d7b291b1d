"""Tiles of kernels that expand W in registers and multiply it as dense: sizes, launches, settings.

The weight tile is the tall side of the tensor cores (64 rows or more: wgmma), x the narrow one.
"""

from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from sparsefx.codegen.triton.form import POWERS, Call, Packed, Problem, cdiv, finished, power
from sparsefx.codegen.triton.variant import Settings, Variant
from sparsefx.packing import Packing
from sparsefx.target import LinearSpec

# out, columns: weight rows and columns of a step; split: programs that share the columns.
SETTINGS = MappingProxyType(
    {
        "out": (16, 32, 64, 128),
        "columns": (32, 64, 128, 256),
        "warps": (1, 2, 4, 8),
        "stages": (1, 2, 3, 4, 5),
        "split": POWERS[:6],
    }
)
_PROGRAMS = 264  # two for each multiprocessor of the largest GPU at hand (H100, H200: 132)


@dataclass(frozen=True)
class Tile:
    """Sizes of one program: weight rows x rows of x, columns a step; warps; pipeline stages."""

    out: int
    rows: int
    columns: int
    warps: int
    stages: int = 3

    def with_settings(self, variant: Variant) -> "Tile":
        """The same with what the handle says in place of the guesses."""
        return Tile(
            out=variant.setting("out", self.out),
            rows=self.rows,
            columns=variant.setting("columns", self.columns),
            warps=variant.setting("warps", self.warps),
            stages=variant.setting("stages", self.stages),
        )


def tile_for(dtype: torch.dtype, rows: int, slots: int = 1) -> Tile:
    """Sizes that no device of the ahead-of-time tests spills registers with.

    `slots`: values of a group that are expanded at once, which is what takes registers.
    fp32 runs without tensor cores (`input_precision="ieee"`) and gets small tiles.
    """
    if dtype == torch.float32:
        few = rows <= 16
        return Tile(out=64 if few else 32, rows=16 if few else 32, columns=32, warps=4)
    if rows <= 32 or slots > 8:
        columns = 64 if rows <= 16 or slots <= 8 else 32
        return Tile(out=64, rows=16 if rows <= 16 else 32, columns=columns, warps=4)
    return Tile(out=128, rows=64, columns=64, warps=8)


def scaled(spec: LinearSpec) -> str | None:
    """Why values of this kind are not expanded in registers, or None."""
    if spec.values == "int8_dynamic":
        return "it does not quantise x"
    if spec.group % 32:
        return f"groups of {spec.group} columns do not tile steps of 32"
    return None


def within(tile: Tile, group: int) -> Tile:
    """The same with steps of columns that share a scale."""
    if not group:
        return tile
    return replace(tile, columns=min(tile.columns, group & -group))


def arranged(packed: Packed) -> Packed:
    """Canonical tensors as kernels take them: fp8 as bytes."""
    dtype = torch.float8_e4m3fn
    return tuple((t.view(torch.int8) if t.dtype == dtype else t).contiguous() for t in packed)


def canonical(variant: Variant, packed: Packed) -> Packed:
    """Inverse of `arranged`."""
    values = packed[0]
    return (values.view(torch.float8_e4m3fn) if variant.values == "fp8" else values, *packed[1:])


def packing(variant: Variant, layout: str) -> Packing:
    """What `sparsefx.packing` calls the storage of a variant."""
    return Packing(
        layout,
        n=variant.n,
        m=variant.m,
        block=variant.block,
        values=variant.values,
        group=variant.group,
    )


def splits(spec: LinearSpec, tile: Tile) -> int:
    """How many programs share the columns so that all multiprocessors have work."""
    programs = cdiv(spec.out_features, tile.out) * cdiv(max(1, spec.rows), tile.rows)
    most = max(1, spec.in_features // (4 * tile.columns))
    wanted = _PROGRAMS // max(1, programs)
    return min(power(wanted, 1, 16), 1 << (most.bit_length() - 1))


def tunings(spec: LinearSpec, tile: Tile) -> tuple[Settings, ...]:
    """The guess, then neighbours of it: fewer and more programs, another pipeline."""
    guess = splits(spec, tile)
    found = [(guess, 3), (max(1, guess // 2), 3), (min(16, guess * 2), 3), (guess, 4), (guess, 2)]
    return tuple(dict.fromkeys((("stages", stages), ("split", split)) for split, stages in found))


def calls(
    variant: Variant, problem: Problem, guess: Tile, constants: dict[str, int | str]
) -> tuple[Call, ...]:
    """The launches of a kernel (x, *packed, scales, bias, extras, y, sizes) on tiles of W."""
    tile = within(guess.with_settings(variant), variant.group)
    split = variant.setting("split", 1)
    rows, out, width = problem.rows, problem.out_features, problem.in_features
    options: dict[str, int | str] = {
        **constants,
        "BLOCK_OUT": tile.out,
        "BLOCK_ROWS": tile.rows,
        "BLOCK_IN": tile.columns,
        "EVEN": int(width % tile.columns == 0),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    grid = (cdiv(out, tile.out), cdiv(rows, tile.rows), split)
    scales = () if variant.values else (None,)
    stored = (*problem.packed, *scales)
    tensors = (problem.x, *stored, problem.bias, problem.extras, problem.y)
    return finished(variant, problem, Call(grid, (*tensors, rows, out, width), options), split)
