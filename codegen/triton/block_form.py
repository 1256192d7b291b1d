"""Dense blocks on tensor cores: `block_template`, for any number of rows."""

import json
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from sparsefx.codegen.triton import tiles
from sparsefx.codegen.triton.form import POWERS, Call, Packed, Problem, cdiv, finished, power
from sparsefx.codegen.triton.variant import Settings, Variant
from sparsefx.target import LinearSpec

SIDES = (16, 32, 64, 128)
_PROGRAMS = 264  # two for each multiprocessor of the largest GPU at hand (H100, H200: 132)


@dataclass(frozen=True)
class BlockForm:
    """Kernels that multiply the stored blocks.

    Settings: rows (of x a program), chunk (columns of a step), warps, stages, split (programs that
    share a row of blocks).
    """

    name = "block"
    layout = "block"
    needs = ""
    interpretable = True
    settings = MappingProxyType(
        {
            "rows": (16, 32, 64, 128, 256),
            "chunk": SIDES,
            "warps": (2, 4, 8),
            "stages": (2, 3, 4, 5),
            "split": POWERS[:5],
        }
    )

    def misfit(self, spec: LinearSpec) -> str | None:
        """Why it cannot compute this linear, or None."""
        if not set(spec.block) <= set(SIDES):
            rows, columns = spec.block
            return f"{rows} x {columns} is no block with sides of {SIDES}"
        if spec.values == "int8_dynamic":
            return "it does not quantise x"
        return None

    def tunings(self, spec: LinearSpec) -> tuple[Settings, ...]:
        """Tiles of x's rows, then splits where there are few programs, then pipelines.

        x is found through the block's column, so that two loads of a step hang together and Triton
        looks ahead by half of the stages: with 3 (or 4, the same code) by one step, with 5 by two.
        """
        rows = _tile(spec.dtype, max(1, spec.rows))
        programs = spec.out_features // spec.block[0] * cdiv(max(1, spec.rows), rows)
        blocks = max(1, int(spec.density * spec.in_features / spec.block[1]))
        split = power(_PROGRAMS // programs, 1, 16)
        while split > 1 and split * 2 > blocks:
            split //= 2
        found = [(rows, 3, split), (rows, 5, split), (rows, 3, max(1, split // 2))]
        if spec.rows > 64 and spec.dtype != torch.float32:
            found += [(rows // 2, 3, split), (rows // 2, 5, split)]
        names = ("rows", "stages", "split")
        return tuple(dict.fromkeys(tuple(zip(names, each, strict=True)) for each in found))

    def arrange(self, variant: Variant, packed: Packed, in_features: int) -> Packed:
        """The canonical tensors, the order of the rows of blocks before the scales."""
        values, columns, row_ptr, *scales = tiles.arranged(packed)
        order = row_ptr.diff().argsort(descending=True, stable=True).to(torch.int32)
        return (values, columns, row_ptr, order, *scales)

    def weight(self, variant: Variant, packed: Packed, out: int, in_features: int) -> Tensor:
        """The dense weight [out, in_features] of the stored tensors, in the variant's dtype."""
        values, columns, row_ptr, _, *scales = tiles.canonical(variant, packed)
        stored = (values, columns, row_ptr, *scales)
        return tiles.packing(variant, self.layout).unpack(stored, in_features)

    def text(self, variant: Variant) -> str:
        """The constants of the block."""
        rows, columns = variant.block
        constants = {"BLOCK_OUT": rows, "BLOCK_IN": columns, "KIND": variant.values}
        return f"CONSTANTS = {json.dumps(constants)}"

    def calls(self, variant: Variant, problem: Problem) -> tuple[Call, ...]:
        """One launch, and one more for the sum of a split."""
        out, width = variant.block
        guess = _tile(variant.dtype, problem.rows)
        rows = min(guess, variant.setting("rows", guess))
        chunk = min(width, variant.setting("chunk", 32 if variant.dtype == torch.float32 else 64))
        large = out * rows >= 8192
        split = variant.setting("split", 1)
        options: dict[str, int | str] = {
            "BLOCK_OUT": out,
            "BLOCK_IN": width,
            "KIND": variant.values,
            "CHUNK": chunk,
            "BLOCK_ROWS": rows,
            "num_warps": variant.setting("warps", 8 if large else 4),
            "num_stages": variant.setting("stages", 3),
        }
        grid = (problem.out_features // out, cdiv(problem.rows, rows), split)
        stored = problem.packed if variant.values else (*problem.packed, None)
        sizes = (problem.rows, problem.out_features, problem.in_features)
        arguments = (problem.x, *stored, problem.bias, problem.extras, problem.y, *sizes)
        return finished(variant, problem, Call(grid, arguments, options), split)


def _tile(dtype: torch.dtype, rows: int) -> int:
    """Rows of x a program: without tensor cores (float32) a small tile, lest registers spill."""
    return power(rows, 16, 32 if dtype == torch.float32 else 128)
