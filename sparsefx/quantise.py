"""Symmetric quantisation of weights: w = code * scale, one scale for a tile of the weight.

    scale = max |w| / largest code      rounded to the weight's dtype
    code  = round(w / scale)            half to even; fp8 to the nearest e4m3 number

A tile is 1 x group for scales along a row, r x c for one scale a block. Products are computed in
float32 (float64 for float64 weights) and rounded once, to the weight's dtype. `int8_dynamic` has
the weights of int8; its inputs are quantised at run time, each row by its own scale.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = {"int8": 127, "int8_dynamic": 127, "int4": 7, "fp8": 448}
"""The largest code of each kind of values."""

CODES = {
    "int8": torch.int8,
    "int8_dynamic": torch.int8,
    "int4": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
"""The type of a code, before int4 codes are packed two a byte."""

Tile = tuple[int, int]


def scales_of(weight: Tensor, kind: str, tile: Tile) -> Tensor:
    """The scale of each tile of `weight` [out, in], in its dtype [ceil(out/r), ceil(in/c)].

    Never 0 where the tile holds a nonzero: then it is the least number of the dtype.
    """
    largest = tiled(weight.abs(), tile).amax((1, 3))
    scales = (wide(largest) / LARGEST[kind]).to(weight.dtype)
    least = torch.finfo(weight.dtype).smallest_normal * torch.finfo(weight.dtype).eps
    return scales.where((scales != 0) | (largest == 0), least)


def codes_of(weight: Tensor, scales: Tensor, kind: str, tile: Tile) -> Tensor:
    """The codes [out, in] of `weight`; 0 where its scale is 0. Their type is CODES[kind]."""
    divisors = wide(scales.where(scales != 0, 1))[:, None, :, None]
    largest = LARGEST[kind]
    exact = (wide(tiled(weight, tile)) / divisors).clamp_(-largest, largest)
    if kind != "fp8":
        return untiled(exact.round_().to(torch.int8), weight.shape)
    codes = untiled(exact.to(torch.float8_e4m3fn), weight.shape).view(torch.int8)
    return codes.where(codes != -128, 0).view(torch.float8_e4m3fn)  # -0.0 is no code of a zero


def values_of(codes: Tensor, scales: Tensor, tile: Tile, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] in `dtype` that `codes` [out, in] stand for."""
    factors = wide(scales)[:, None, :, None]
    products = tiled(codes.to(factors.dtype), tile) * factors
    return untiled(products.to(dtype), codes.shape)


def rounded(weight: Tensor, kind: str, tile: Tile) -> Tensor:
    """`weight` [out, in] as its codes and scales hold it, in its dtype."""
    scales = scales_of(weight, kind, tile)
    return values_of(codes_of(weight, scales, kind, tile), scales, tile, weight.dtype)


def quantised_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., in] as whole numbers in -127..127 and the scale [..., 1] of each row, both float64.

    What a kernel of "int8_dynamic" does to its input.
    """
    scales = wide(x).abs().amax(-1, keepdim=True) / LARGEST["int8_dynamic"]
    codes = (wide(x) / scales.where(scales != 0, 1)).round()
    return codes.double(), scales.double()


def tiled(matrix: Tensor, tile: Tile) -> Tensor:
    """[out, in] as [ceil(out/r), r, ceil(in/c), c], filled up with zeros."""
    out, width = matrix.shape
    rows, cols = tile
    if out % rows or width % cols:
        matrix = F.pad(matrix, (0, -width % cols, 0, -out % rows))
    return matrix.reshape(matrix.shape[0] // rows, rows, matrix.shape[1] // cols, cols)


def untiled(tiles: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of `tiled`, for a matrix of `shape`."""
    high, rows, wide_, cols = tiles.shape
    whole = tiles.reshape(high * rows, wide_ * cols)
    return whole[: shape[0], : shape[1]].contiguous()


def wide(tensor: Tensor) -> Tensor:
    """float64 as it is, all others as float32: what products are computed in."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
