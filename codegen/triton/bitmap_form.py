"""Bitmaps by expansion in registers: `bitmap_template`, for any density and number of rows."""

from dataclasses import dataclass

from torch import Tensor

from sparsefx import formats
from sparsefx.codegen.triton import tiles
from sparsefx.codegen.triton.form import Call, Packed, Problem
from sparsefx.codegen.triton.variant import Settings, Variant
from sparsefx.formats import PackedBitmap
from sparsefx.target import LinearSpec


@dataclass(frozen=True)
class BitmapForm:
    """Kernels that find each weight's rank in its row. Settings as in `tiles.SETTINGS`."""

    name = "bitmap"
    layout = "bitmap"
    needs = ""
    interpretable = True
    settings = tiles.SETTINGS

    def misfit(self, spec: LinearSpec) -> str | None:
        """Why it cannot compute this linear, or None."""
        if spec.values:
            return f"{spec.values} values are not expanded by this kernel"
        stored = spec.density * spec.out_features * spec.in_features
        return "more than 2^31 - 1 stored values" if stored >= 2**31 else None

    def tunings(self, spec: LinearSpec) -> tuple[Settings, ...]:
        """The guess."""
        return ((),)

    def arrange(self, variant: Variant, packed: Packed, in_features: int) -> Packed:
        """The canonical tensors as they are."""
        return tuple(tensor.contiguous() for tensor in packed)

    def weight(self, variant: Variant, packed: Packed, out: int, in_features: int) -> Tensor:
        """The dense weight [out, in_features] of the stored tensors, in the variant's dtype."""
        return formats.unpack_bitmap(PackedBitmap(*packed), in_features)

    def text(self, variant: Variant) -> str:
        """Nothing: a bitmap has no pattern."""
        return ""

    def calls(self, variant: Variant, problem: Problem) -> tuple[Call, ...]:
        """One launch."""
        tile = tiles.tile_for(variant.dtype, problem.rows)
        return tiles.calls(variant, problem, tile, {})
