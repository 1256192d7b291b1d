"""Grid: the codes that the weights of a solver may take, one column of the weight at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefx.quantise import Tile, codes_of, values_of


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
