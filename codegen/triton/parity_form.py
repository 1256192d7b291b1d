"""2:4 on parity slots: `parity_template`, for few rows of x on any device.

Takes about half the instructions of `nm` a stored weight; the portable twin of `mma_sp`.
"""

from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from sparsefx import formats
from sparsefx.codegen.triton import parity_pack, tiles
from sparsefx.codegen.triton.form import Call, Packed, Problem
from sparsefx.codegen.triton.tiles import Tile
from sparsefx.codegen.triton.variant import Settings, Variant
from sparsefx.target import LinearSpec

MOST_ROWS = 64


@dataclass(frozen=True)
class ParityForm:
    """Kernels that mask and rotate words of two values. Settings as in `tiles.SETTINGS`."""

    name = "parity"
    layout = "nm"
    needs = ""
    interpretable = True
    settings = MappingProxyType({**tiles.SETTINGS, "columns": (32, 64, parity_pack.COLUMNS)})

    def misfit(self, spec: LinearSpec) -> str | None:
        """Why it cannot compute this linear, or None."""
        if (spec.n, spec.m) != (2, 4):
            return f"{spec.n}:{spec.m} is not 2:4"
        if spec.values:
            return f"{spec.values} values have no half of a word"
        if spec.dtype not in (torch.float16, torch.bfloat16):
            return f"two values of {spec.dtype} are not a word of 32 bits"
        if spec.rows > MOST_ROWS:
            return f"{spec.rows} rows are more than {MOST_ROWS}, up to which this kernel pays"
        return None

    def tunings(self, spec: LinearSpec) -> tuple[Settings, ...]:
        """Splits that give every multiprocessor a program; then another tile with its splits."""
        tile, other = _tile(spec.rows), _other(spec.rows)
        sizes = (("out", other.out), ("columns", other.columns), ("warps", other.warps))
        further = tiles.tunings(spec, other)[:3]
        return (*tiles.tunings(spec, tile), *((*sizes, *each) for each in further))

    def arrange(self, variant: Variant, packed: Packed, in_features: int) -> Packed:
        """Words and codes, int32."""
        values, index = packed
        kept = values.unflatten(1, (-1, 2))
        columns = formats.index_columns(index, 4)[:, : values.shape[1]].long()
        return parity_pack.pack(kept, columns.view(kept.shape))

    def weight(self, variant: Variant, packed: Packed, out: int, in_features: int) -> Tensor:
        """The dense weight [out, in_features] of the stored tensors, in the variant's dtype."""
        words, codes = packed
        return parity_pack.unpack(words, codes, variant.dtype)[:, :in_features]

    def text(self, variant: Variant) -> str:
        """Nothing: the template is of one pattern."""
        return ""

    def calls(self, variant: Variant, problem: Problem) -> tuple[Call, ...]:
        """One launch, and one more for the sum of a split."""
        constants: dict[str, int | str] = {"PADDED": parity_pack.COLUMNS}
        return tiles.calls(variant, problem, _tile(problem.rows), constants)


def _tile(rows: int) -> Tile:
    """Sizes that no device of the ahead-of-time tests spills registers with."""
    if rows <= 16:
        return Tile(out=128, rows=16, columns=128, warps=4)
    return Tile(out=128, rows=32 if rows <= 32 else 64, columns=64, warps=4)


def _other(rows: int) -> Tile:
    """Fewer registers a thread: more programs on a multiprocessor, for more instructions."""
    if rows <= 16:
        return Tile(out=64, rows=16, columns=128, warps=4)
    return replace(_tile(rows), warps=8)
