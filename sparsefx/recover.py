"""recovered_scales(): the scales of a weight that was rounded to codes, from its numbers alone.

    s = max |w| / k  for k = largest code, ..., and the two numbers beside s

is the scale of a tile if every weight of it is code * s bit for bit. k is below the largest code
where later steps moved the tile's largest weight (SparseGPT).
"""

import torch
from torch import Tensor

from sparsefx.quantise import LARGEST, Tile, codes_of, tiled, values_of, wide

_SAMPLE = (
    4,
    64,
)  # tiles, and weights of each, that are looked at first: ordinary weights end there
_CHUNK = 1 << 22  # elements looked at in one go
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

# The codes that a tile's largest weight may have, likely ones first. Half of int8's range would be
# int7. The e4m3 numbers repeat themselves a factor of two further down, but for 240.
_LARGEST: dict[str, tuple[int, ...]] = {
    "int8": tuple(range(127, 63, -1)),
    "int8_dynamic": tuple(range(127, 63, -1)),
    "int4": tuple(range(7, 0, -1)),
    "fp8": (*range(448, 255, -32), 240),
}
assert set(_LARGEST) == set(LARGEST)


def recovered_scales(weight: Tensor, kind: str, tile: Tile) -> Tensor | None:
    """Scales [ceil(out/r), ceil(in/c)] in the dtype of `weight`, or None if there are none.

    With them `values_of(codes_of(weight, ...))` is `weight` [out, in], but that -0.0 becomes 0.0.
    """
    found: list[Tensor] = []
    rows = max(1, _CHUNK // max(1, weight.shape[1]) // tile[0]) * tile[0]
    for chunk in weight.detach().split(rows):
        grid = tiled(chunk, tile).transpose(1, 2)
        tiles = grid.reshape(-1, grid.shape[2] * grid.shape[3])
        scales = _scales(tiles, kind) if found or _is_likely(tiles, kind) else None
        if scales is None:
            return None
        found.append(scales.view(grid.shape[:2]))
    return torch.cat(found) if found else None


def _is_likely(tiles: Tensor, kind: str) -> bool:
    """Whether some weights of the first few tiles could be codes."""
    for tile in tiles[(tiles != 0).any(1).nonzero()[: _SAMPLE[0], 0]]:
        divisors = torch.tensor(_LARGEST[kind], device=tile.device)
        largest = tile.abs().amax().expand(len(divisors))
        few = tile[tile != 0][: _SAMPLE[1]].expand(len(divisors), -1)
        tried = (_beside(_quotient(largest, divisors), step) for step in (0, -1, 1))
        if not any(_holds(few, scales, kind).any() for scales in tried):
            return False
    return True


def _scales(tiles: Tensor, kind: str) -> Tensor | None:
    """The scale of each of `tiles` [tiles, weights], 0 for those of zeros."""
    largest = tiles.abs().amax(1)
    scales = torch.zeros_like(largest)
    unknown = largest.nonzero()[:, 0]
    for divisor in _LARGEST[kind]:
        for step in (0, -1, 1):
            if not len(unknown):
                return scales
            tried = _beside(_quotient(largest[unknown], divisor), step)
            are_all = len(unknown) == len(tiles)  # spares a copy, most of the time
            fits = _holds(tiles if are_all else tiles[unknown], tried, kind)
            scales[unknown[fits]] = tried[fits]
            unknown = unknown[~fits]
    return None if len(unknown) else scales


def _quotient(largest: Tensor, divisor: int | Tensor) -> Tensor:
    return (wide(largest) / divisor).to(largest.dtype)


def _beside(scales: Tensor, step: int) -> Tensor:
    """The representable numbers `step` further; positive floats are ordered like their bits."""
    bits = scales.view(_INTEGERS[scales.element_size()])
    return (bits + step).clamp_(min=0).view(scales.dtype)


def _holds(tiles: Tensor, scales: Tensor, kind: str) -> Tensor:
    """Bool [tiles]: whether every weight is a code times the tile's scale."""
    own = (1, tiles.shape[1])
    codes = codes_of(tiles, scales[:, None], kind, own)
    return (values_of(codes, scales[:, None], own, tiles.dtype) == tiles).all(1)
