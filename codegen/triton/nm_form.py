"""N:M by expansion in registers: `nm_template`, for any device, pattern and number of rows."""

import json
from dataclasses import dataclass

from torch import Tensor

from sparsefx.codegen.triton import tiles
from sparsefx.codegen.triton.form import Call, Packed, Problem
from sparsefx.codegen.triton.variant import Settings, Variant
from sparsefx.formats import index_bits
from sparsefx.target import LinearSpec


@dataclass(frozen=True)
class NMForm:
    """Kernels that compare each index with 0 .. m - 1. Settings as in `tiles.SETTINGS`."""

    name = "nm"
    layout = "nm"
    needs = ""
    interpretable = True
    settings = tiles.SETTINGS

    def misfit(self, spec: LinearSpec) -> str | None:
        """Why it cannot compute this linear, or None."""
        return tiles.scaled(spec)

    def tunings(self, spec: LinearSpec) -> tuple[Settings, ...]:
        """Splits that give every multiprocessor a program."""
        slots = _slots(spec.n)
        return tiles.tunings(spec, tiles.tile_for(spec.dtype, spec.rows, slots))

    def arrange(self, variant: Variant, packed: Packed, in_features: int) -> Packed:
        """The canonical tensors as they are."""
        return tiles.arranged(packed)

    def weight(self, variant: Variant, packed: Packed, out: int, in_features: int) -> Tensor:
        """The dense weight [out, in_features] of the stored tensors, in the variant's dtype."""
        return tiles.packing(variant, self.layout).unpack(
            tiles.canonical(variant, packed), in_features
        )

    def text(self, variant: Variant) -> str:
        """The constants of the pattern."""
        return f"CONSTANTS = {json.dumps(_constants(variant))}"

    def calls(self, variant: Variant, problem: Problem) -> tuple[Call, ...]:
        """One launch, and one more for the sum of a split."""
        slots = _slots(variant.n)
        tile = tiles.tile_for(variant.dtype, problem.rows, slots)
        return tiles.calls(variant, problem, tile, _constants(variant))


def _slots(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _constants(variant: Variant) -> dict[str, int | str]:
    n, m = variant.n, variant.m
    pattern: dict[str, int | str] = {"KEPT": n, "SLOTS": _slots(n), "GROUP": m}
    return {**pattern, "BITS": index_bits(m), "KIND": variant.values, "SCALED": variant.group}
