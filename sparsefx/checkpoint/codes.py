"""Codes of a checkpoint: which weights are codes times scales, and how they lie in the file."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from sparsefx.checkpoint.layout import BadLayout, Entry, as_matrix
from sparsefx.detect import Found
from sparsefx.nibbles import pack_nibbles, unpack_nibbles
from sparsefx.patterns import Block, Pattern, Unstructured
from sparsefx.quantise import CODES, LARGEST, codes_of, values_of
from sparsefx.recover import recovered_scales
from sparsefx.values import with_values

Tile = tuple[int, int]


def coded(tensor: Tensor, axis: int, hint: Pattern | None) -> tuple[str, Tile] | None:
    """The kind of codes in `tensor`, seen as a matrix along `axis`, and the tile of a scale.

    hint: what was decided for the tensor; without one only a matrix of weights along its last axis
    is looked at. None where its numbers are no codes.
    """
    matrix = as_matrix(tensor, axis)
    if hint is not None and hint.values:
        kind = "int8" if hint.values == "int8_dynamic" else hint.values
        for tile in _tiles(tensor, axis, hint):
            if recovered_scales(matrix, kind, tile) is not None:
                return kind, tile
        return None
    if tensor.dim() != len(("out", "in")) or axis != 1:
        return None
    pattern = with_values(Found(Unstructured(0.5), 0.5), matrix).pattern
    assert pattern is not None
    high, wide = pattern.tile(matrix.shape[1])
    return (pattern.values, (high, min(wide, matrix.shape[1]))) if pattern.values else None


def _tiles(tensor: Tensor, axis: int, hint: Pattern) -> Iterator[Tile]:
    """What may share a scale; of a convolution all taps of an output do, which are rows here."""
    rows, columns = tensor.numel() // tensor.shape[axis], tensor.shape[axis]
    high, wide = hint.tile(columns)
    yield min(high, rows), min(wide, columns)
    if not isinstance(hint, Block) and axis == 1 and tensor.dim() > len(("out", "in")):
        yield tensor[0, 0].numel(), columns


def pack_codes(matrix: Tensor, entry: Entry) -> tuple[Tensor, Tensor]:
    """The codes of `matrix` as int8 numbers or bits, of its shape, and their scales."""
    scales = recovered_scales(matrix, entry.values, entry.tile)
    assert scales is not None  # `coded` has found them
    return codes_of(matrix, scales, entry.values, entry.tile).view(torch.int8), scales


def stored_codes(values: Tensor, entry: Entry) -> Tensor:
    """Packed int8 codes as the file has them."""
    if entry.values == "int4":
        return pack_nibbles(values)
    return values.view(CODES[entry.values])


def loaded_codes(values: Tensor, entry: Entry, count: int) -> Tensor:
    """Inverse of `stored_codes` for `count` codes in a row."""
    return unpack_nibbles(values, count) if entry.values == "int4" else values.view(torch.int8)


def weights_of(codes: Tensor, scales: Tensor, entry: Entry) -> Tensor:
    """The matrix that int8 numbers or bits `codes` stand for."""
    return values_of(codes.view(CODES[entry.values]), scales, entry.tile, entry.dtype)


def check_codes(name: str, entry: Entry, parts: Mapping[str, Tensor], codes: Tensor) -> None:
    """Raises BadLayout for codes or scales that `save` never writes."""
    scales = parts[":scales"]
    if not scales.isfinite().all() or (scales < 0).any():
        raise BadLayout(f"{name} has scales that are negative, infinite or no numbers")
    numbers = codes.view(CODES[entry.values]).float()
    if not (numbers.abs() <= LARGEST[entry.values]).all():  # false for NaN
        raise BadLayout(f"{name} has codes beyond {LARGEST[entry.values]}")
    if entry.values == "int4" and not torch.equal(pack_nibbles(codes), parts[":values"]):
        raise BadLayout(f"{name} has codes behind its last one")
