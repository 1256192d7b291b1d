"""Bitmaps by expansion in registers: `bitmap_template`, for any density and number of rows."""

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefx import formats
from sparsefx.codegen.triton import tiles
from sparsefx.codegen.triton.form import Call, Packed, Problem, cdiv
from sparsefx.codegen.triton.variant import Settings, Variant
from sparsefx.target import LinearSpec


@dataclass(frozen=True)
class BitmapForm:
    """Kernels that find each weight's rank in its row. Settings as in `tiles.SETTINGS`.

    Programs that share a row each need the rank at which they begin: `arrange` counts them, for as
    many parts as the variant has.
    """

    name = "bitmap"
    layout = "bitmap"
    needs = ""
    interpretable = True
    settings = tiles.SETTINGS

    def misfit(self, spec: LinearSpec) -> str | None:
        """Why it cannot compute this linear, or None."""
        stored = spec.density * spec.out_features * spec.in_features
        many = "more than 2^31 - 1 stored values" if stored >= 2**31 else None
        return many or tiles.scaled(spec)

    def tunings(self, spec: LinearSpec) -> tuple[Settings, ...]:
        """Splits that give every multiprocessor a program."""
        found = tiles.tunings(spec, tiles.tile_for(spec.dtype, spec.rows))
        return tuple(dict.fromkeys((("split", dict(each)["split"]),) for each in found))

    def arrange(self, variant: Variant, packed: Packed, in_features: int) -> Packed:
        """Values, bits, and int32 [split, out]: the rank at which each part of a row begins."""
        values, bits, row_ptr, *scales = tiles.arranged(packed)
        keep = formats.unpack_bits(bits, in_features)
        chunk = _chunk(variant, in_features)
        starts = [keep[:, : part * chunk].sum(1) for part in range(variant.setting("split", 1))]
        ranks = row_ptr[:-1] + torch.stack(starts)
        return (values, bits, ranks.to(torch.int32), *scales)

    def weight(self, variant: Variant, packed: Packed, out: int, in_features: int) -> Tensor:
        """The dense weight [out, in_features] of the stored tensors, in the variant's dtype."""
        values, bits, ranks, *scales = tiles.canonical(variant, packed)
        end = len(values) * (2 if variant.values == "int4" else 1)
        row_ptr = torch.cat((ranks[0], ranks.new_tensor([end])))
        stored = (values, bits, row_ptr, *scales)
        return tiles.packing(variant, self.layout).unpack(stored, in_features)

    def text(self, variant: Variant) -> str:
        """How values are stored."""
        return f"CONSTANTS = {json.dumps(_constants(variant))}"

    def calls(self, variant: Variant, problem: Problem) -> tuple[Call, ...]:
        """One launch, and one more for the sum of a split."""
        tile = tiles.tile_for(variant.dtype, problem.rows)
        constants = {**_constants(variant), "CHUNK": _chunk(variant, problem.in_features)}
        return tiles.calls(variant, problem, tile, constants)


def _constants(variant: Variant) -> dict[str, int | str]:
    return {"KIND": variant.values, "SCALED": variant.group}


def _chunk(variant: Variant, in_features: int) -> int:
    """Columns of a part, whole steps of any size."""
    widest = tiles.SETTINGS["columns"][-1]
    return cdiv(cdiv(in_features, variant.setting("split", 1)), widest) * widest
