"""Bitmaps by stored value: `places_template`, for few rows of x on any device.

`bitmap` works for each column of W, stored or not; here the zeros cost nothing.
"""

from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from sparsefx.codegen.triton import places_pack
from sparsefx.codegen.triton.form import POWERS, Call, Packed, Problem, cdiv, finished, power
from sparsefx.codegen.triton.places_pack import MOST_COLUMNS, VALUES, Places
from sparsefx.codegen.triton.variant import Settings, Variant
from sparsefx.formats import PackedBitmap
from sparsefx.target import LinearSpec

MOST_ROWS = 16
_TOGETHER = 8  # rows of x whose numbers of a column are one load of 128 bits
_LANES = 32 * 16 * 132  # 16 warps for each multiprocessor of the largest GPU at hand (H100, H200)
_NEAR = 128 * 1024  # bytes of x that programs at work together may gather from: half of an L1


@dataclass(frozen=True)
class PlacesForm:
    """Kernels that gather x at the columns of stored values.

    Settings: lanes (that share a row of W), warps, split (programs that share a row of W), ahead
    (1: the next vector of a lane is loaded before this one is multiplied).
    """

    name = "places"
    layout = "bitmap"
    needs = ""
    interpretable = True
    settings = MappingProxyType(
        {"lanes": (8, 16, 32), "warps": (2, 4, 8), "split": POWERS[:5], "ahead": (0, 1)}
    )

    def misfit(self, spec: LinearSpec) -> str | None:
        """Why it cannot compute this linear, or None."""
        if spec.values:
            return f"{spec.values} values are not stored by place"
        if spec.dtype not in (torch.float16, torch.bfloat16):
            return f"vectors are of 16-bit values, not {spec.dtype}"
        if spec.rows > MOST_ROWS:
            return f"{spec.rows} rows are more than {MOST_ROWS}, up to which this kernel pays"
        if spec.in_features > MOST_COLUMNS:
            return f"{spec.in_features} columns are more than {MOST_COLUMNS}, which a base can name"
        values = spec.out_features * _vectors(spec) * VALUES
        if values * 3 >= spec.out_features * spec.in_features * 2:
            return "values with their columns take as much memory as the dense weight"
        return "more than 2^31 - 1 stored values" if values >= 2**31 else None

    def tunings(self, spec: LinearSpec) -> tuple[Settings, ...]:
        """Lanes enough to keep memory busy, and loads ahead where there is little else to do.

        Then fewer lanes, of which fewer idle at the end of a row; last a split, which launches
        twice. But where x by columns is larger than what stays near a multiprocessor, programs that
        begin together share a part of it.
        """
        most = power(_vectors(spec), 8, 32)
        lanes = min(most, power(_LANES // max(1, spec.out_features), 8, 32))
        near = power(cdiv(spec.in_features * power(spec.rows, 1, 16) * 2, _NEAR), 1, 16)
        ahead, fewer = int(spec.rows <= 4), max(8, lanes // 2)
        found = [(lanes, 2, near, ahead), (fewer, 2, near, ahead), (fewer, 2, near, 1 - ahead)]
        found += [(lanes, 2, near, 1 - ahead), (lanes, 4, near, ahead)]
        found += [(min(most, lanes * 2), 2, near, ahead), (lanes, 2, min(16, near * 2), ahead)]
        names = ("lanes", "warps", "split", "ahead")
        return tuple(dict.fromkeys(tuple(zip(names, each, strict=True)) for each in found))

    def arrange(self, variant: Variant, packed: Packed, in_features: int) -> Packed:
        """Values, places, bases and starts of vectors."""
        return places_pack.pack(PackedBitmap(*packed), in_features)

    def weight(self, variant: Variant, packed: Packed, out: int, in_features: int) -> Tensor:
        """The dense weight [out, in_features] of the stored tensors, in the variant's dtype."""
        return places_pack.unpack(Places(*packed), in_features)

    def text(self, variant: Variant) -> str:
        """Nothing: the template reads the types of its tensors."""
        return ""

    def calls(self, variant: Variant, problem: Problem) -> tuple[Call, ...]:
        """The kernel; before it, for several rows, x by columns; behind it the sum of a split.

        More than MOST_ROWS rows, which may come where their number varies, are taken in parts.
        """
        starts = range(0, problem.rows, MOST_ROWS)
        parts = [problem.part(start, start + MOST_ROWS) for start in starts]
        return tuple(call for part in parts for call in _calls(variant, part))


def _calls(variant: Variant, problem: Problem) -> tuple[Call, ...]:
    lanes, warps = variant.setting("lanes", 8), variant.setting("warps", 2)
    split, length = variant.setting("split", 1), 32 * warps
    together = power(problem.rows, 1, _TOGETHER)
    planes = cdiv(problem.rows, together)
    x, before = _ordered(problem, planes, together) if problem.rows > 1 else (problem.x, ())
    options: dict[str, int | str] = {
        "ROWS": together,
        "PLANES": planes,
        "LANES": lanes,
        "LENGTH": length,
        "AHEAD": variant.setting("ahead", 0),
        "num_warps": warps,
    }
    grid = (cdiv(problem.out_features, length // lanes), split)
    sizes = (problem.rows, problem.out_features, problem.in_features)
    tensors = (x, *problem.packed, problem.bias, problem.extras, problem.y)
    call = Call(grid, (*tensors, *sizes), options)
    return (*before, *finished(variant, problem, call, split))


def _vectors(spec: LinearSpec) -> int:
    """Of a row of W, about."""
    stored = spec.in_features * spec.density
    return max(1, round(stored / places_pack.fill(spec.density) + 0.5))


def _ordered(problem: Problem, planes: int, together: int) -> tuple[Tensor, tuple[Call, ...]]:
    x, columns = problem.x, 256
    y = x.new_empty(planes, problem.in_features, together)
    sizes: dict[str, int | str] = {"ROWS": together, "COLUMNS": columns, "num_warps": 4}
    grid = (cdiv(problem.in_features, columns), planes)
    return y, (Call(grid, (x, y, problem.rows, problem.in_features), sizes, "ordered"),)
