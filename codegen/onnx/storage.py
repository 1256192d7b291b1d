"""How a packed weight lies in an ONNX file, and its way there from formats.py.

N:M     values [out, in*n/m] and codes, as `formats.PackedNM` has them: 2 bits a value for m = 4
        (0.531 of a dense fp32 weight at 2:4), 4 bits for m = 8 and 16.
bitmap  "delta8": values [k] and gaps uint8 [k]; value i lies at flat position
        gaps[0] + ... + gaps[i] of the row-major weight, which has fewer than 2^31 elements. A
        distance above 255 is bridged by values that are zero. A bit for each weight would be
        smaller below 87 % sparsity, but no onnxruntime operator that folds at load and has an fp16
        kernel turns bits into positions.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from sparsefx.formats import PackedBitmap, unpack_bits

_FARTHEST = 255


class Delta8(NamedTuple):
    """A weight as values and the distances between them."""

    values: Tensor
    gaps: Tensor


def to_delta8(packed: PackedBitmap, in_features: int) -> Delta8:
    """The delta8 form of a bitmap weight [out, in_features]; at least one value, perhaps a zero."""
    positions = unpack_bits(packed.bits, in_features).flatten().nonzero().flatten()
    distances = positions.diff(prepend=positions.new_zeros(1))
    fillers = (distances - 1).clamp(
        min=0
    ) // _FARTHEST  # distance = fillers * 255 + rest, 0 <= rest <= 255
    ends = (fillers + 1).cumsum(0) - 1
    count = int(ends[-1]) + 1 if len(ends) else 1
    values = packed.values.new_zeros(count)
    gaps = torch.full((count,), _FARTHEST, dtype=torch.uint8, device=values.device)
    if not len(ends):
        return Delta8(values, gaps.zero_())
    values[ends] = packed.values
    gaps[ends] = (distances - fillers * _FARTHEST).to(torch.uint8)
    return Delta8(values, gaps)


def from_delta8(packed: Delta8, shape: tuple[int, int]) -> Tensor:
    """The dense weight of `shape` [out, in]: what the ONNX decompressor computes."""
    dense = packed.values.new_zeros(shape[0] * shape[1])
    return dense.scatter_(0, packed.gaps.long().cumsum(0), packed.values).view(shape)
