"""Grid: the codes that the weights of a solver may take, one column of the weight at a time.

Eight bits reach from the largest weight of a tile to small ones. Four do not: there a smaller
scale, which cuts off the largest, may leave less error in all:

    scale = share * max |w| / largest code,  share = 1, 0.95, ..., 0.6 of least sum (w - code)^2
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefx.quantise import Tile, codes_of, scales_of, tiled, values_of


@dataclass(frozen=True)
class Grid:
    """Codes of a `kind` at `scales` [ceil(out/r), ceil(in/c)], in the weight's dtype."""

    scales: Tensor
    kind: str
    tile: Tile

    def nearest(self, column: Tensor, number: int) -> Tensor:
        """The nearest code * scale of each weight of column `number`, float32 [out]."""
        rows, cols = self.tile
        scales = self.scales[:, number // cols].repeat_interleave(rows)[:, None]
        codes = codes_of(column[:, None], scales, self.kind, (1, 1))
        return values_of(codes, scales, (1, 1), self.scales.dtype).flatten().to(torch.float32)

    @classmethod
    def fitted(cls, weight: Tensor, kind: str, tile: Tile) -> "Grid":
        """The grid for the kept weights of `weight` [out, in], 0 elsewhere."""
        whole = scales_of(weight, kind, tile)
        if kind != "int4":
            return cls(whole, kind, tile)
        grids = [cls((whole * share).to(weight.dtype), kind, tile) for share in _SHARES]
        errors = torch.stack([grid.errors(weight) for grid in grids])
        best = errors.argmin(0, keepdim=True)
        return cls(torch.stack([grid.scales for grid in grids]).gather(0, best)[0], kind, tile)

    def errors(self, weight: Tensor) -> Tensor:
        """The squared error of rounding `weight` to it, of each tile."""
        codes = codes_of(weight, self.scales, self.kind, self.tile)
        stored = values_of(codes, self.scales, self.tile, weight.dtype)
        return tiled((weight - stored).float().square_(), self.tile).sum((1, 3))


_SHARES = tuple(1 - step / 20 for step in range(9))
