"""Packing: how a weight is stored, layout and kind of values together; dense <-> tensors.

    nm      values, index [, scales]
    bitmap  values, bits, row_ptr [, scales]
    block   values, columns, row_ptr [, scales]

as formats.py has them. Quantised values are codes (quantise.py): int8 as torch.int8, fp8 as
torch.float8_e4m3fn, int4 two a byte (nibbles.py; rows of a block and rows of W start at whole
bytes, and a bitmap's row_ptr counts each row's codes up to an even number). Scales are in the
weight's dtype: [out, ceil(in/group)], [out, 1] for group = 0, and [blocks] for blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsefx.errors import ShapeMismatch
from sparsefx.formats import (
    NM_GROUPS,
    PackedBitmap,
    PackedBlock,
    PackedNM,
    block_rows,
    pack_bitmap,
    pack_block,
    pack_nm,
    unpack_bitmap,
    unpack_block,
    unpack_nm,
)
from sparsefx.nibbles import narrow_bitmap, pack_nibbles, unpack_nibbles, widen_bitmap
from sparsefx.patterns import NM, Block, Pattern, Unstructured
from sparsefx.quantise import CODES, Tile, codes_of, values_of
from sparsefx.recover import recovered_scales

PARTS = {
    "nm": ("values", "index"),
    "bitmap": ("values", "bits", "row_ptr"),
    "block": ("values", "columns", "row_ptr"),
}
"""The names of a layout's tensors; quantised ones have "scales" behind them."""


@dataclass(frozen=True)
class Packing:
    """A way to store a weight; fields as those of `LinearSpec`."""

    layout: str
    n: int = 0
    m: int = 0
    block: Tile = (0, 0)
    values: str = ""
    group: int = 0

    @classmethod
    def of(cls, pattern: Pattern) -> "Packing":
        """The tightest packing of weights of a pattern that was found in them."""
        values, group = pattern.values, pattern.group
        if isinstance(pattern, NM) and pattern.m in NM_GROUPS:
            return cls("nm", n=pattern.n, m=pattern.m, values=values, group=group)
        if isinstance(pattern, Block):
            return cls("block", block=(pattern.rows, pattern.cols), values=values)
        return cls("bitmap", values=values, group=group)

    def pattern(self, sparsity: float) -> Pattern:
        """The pattern that weights stored like this follow; `sparsity` is their share of zeros."""
        match self.layout:
            case "nm":
                return NM(self.n, self.m, values=self.values, group=self.group)
            case "block":
                return Block(*self.block, sparsity, values=self.values)
            case _:
                return Unstructured(sparsity, values=self.values, group=self.group)

    def __str__(self) -> str:
        """As a person reads it: "2:4 weights with int8 values"."""
        shapes = {"nm": f"{self.n}:{self.m}", "block": "{}x{} block".format(*self.block)}
        return (
            f"{shapes.get(self.layout, self.layout)} weights with {self.values or 'plain'} values"
        )

    def as_bitmap(self) -> "Packing":
        """The same values in a bitmap; unquantised where those of a block share a scale."""
        rows, cols = self.block
        if self.layout == "block" and self.values:
            alike = rows == 1
            return Packing("bitmap", values=self.values, group=cols) if alike else Packing("bitmap")
        return Packing("bitmap", values=self.values, group=self.group)

    def alternatives(self) -> "tuple[Packing, ...]":
        """Other ways to store the same weight, for where no kernel reads this one; best first."""
        plain = replace(self, values="", group=0)
        others = (self.as_bitmap(), plain, plain.as_bitmap())
        return tuple(each for each in dict.fromkeys(others) if each != self)

    def density(self, tensors: Sequence[Tensor], elements: int) -> float:
        """The share of stored values in a weight of so many elements."""
        if self.layout == "nm":
            return self.n / self.m
        rows, cols = self.block
        stored = int(tensors[2][-1]) * (rows * cols if self.layout == "block" else 1)
        return stored / max(1, elements)

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its tensors, in order."""
        return (*PARTS[self.layout], *(("scales",) if self.values else ()))

    def tile(self, in_features: int) -> Tile:
        """What of the weight [out, in_features] shares a scale."""
        return self.block if self.layout == "block" else (1, self.group or max(1, in_features))

    def pack(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The tensors of `weight` [out, in]; `unpack` gives it back, but -0.0 may become 0.0.

        Raises ShapeMismatch if the weight does not have the layout, or is no code * scale.
        """
        if not self.values:
            return self._sparse(weight)
        tile = self.tile(weight.shape[1])
        scales = recovered_scales(weight, self.values, tile)
        if scales is None:
            raise ShapeMismatch(
                name="weight",
                shape=tuple(weight.shape),
                rule=f"its numbers are not {self.values} codes times scales",
                remedy="Round it with sparsify first, or leave its values as they are",
            )
        codes = codes_of(weight, scales, self.values, tile)
        values, *rest = self._narrow(self._sparse(codes.view(torch.int8)))
        if self.layout == "block":
            scales = scales[block_rows(rest[1]), rest[0].long()]
        return (values.view(torch.uint8 if self._is_narrow else CODES[self.values]), *rest, scales)

    def unpack(
        self, tensors: Sequence[Tensor], in_features: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The dense weight [out, in_features], rounded to `dtype`; None: that of the weight."""
        if not self.values:
            return self._dense(tensors, in_features)
        *stored, scales = tensors
        dtype = dtype or scales.dtype
        if self.layout == "block":
            values = self._wide(stored, in_features)[0]
            whole = (1, self.block[0] * self.block[1])  # there may be no block to read it from
            flat = values_of(values.flatten(1), scales[:, None], whole, dtype)
            return unpack_block(PackedBlock(flat.view(values.shape), *stored[1:]), in_features)
        bits = stored[0].view(torch.uint8 if self._is_narrow else torch.int8)
        codes = self._wide((bits, *stored[1:]), in_features)
        dense = self._dense(codes, in_features).view(CODES[self.values])
        return values_of(dense, scales, self.tile(in_features), dtype)

    @property
    def _is_narrow(self) -> bool:
        return self.values == "int4"

    def _sparse(self, weight: Tensor) -> tuple[Tensor, ...]:
        match self.layout:
            case "nm":
                return pack_nm(weight, self.n, self.m)
            case "bitmap":
                return pack_bitmap(weight)
            case _:
                return pack_block(weight, *self.block)

    def _dense(self, tensors: Sequence[Tensor], in_features: int) -> Tensor:
        match self.layout:
            case "nm":
                return unpack_nm(PackedNM(*tensors), self.n, self.m)
            case "bitmap":
                return unpack_bitmap(PackedBitmap(*tensors), in_features)
            case _:
                return unpack_block(PackedBlock(*tensors), in_features)

    def _narrow(self, stored: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """int4 codes two a byte."""
        if not self._is_narrow:
            return stored
        if isinstance(stored, PackedBitmap):
            return narrow_bitmap(stored)
        return (pack_nibbles(stored[0]), *stored[1:])

    def _wide(self, stored: Sequence[Tensor], in_features: int) -> Sequence[Tensor]:
        """Inverse of `_narrow`."""
        if not self._is_narrow:
            return stored
        if self.layout == "bitmap":
            return widen_bitmap(PackedBitmap(*stored), in_features)
        count = self.block[1] if self.layout == "block" else in_features // self.m * self.n
        return (unpack_nibbles(stored[0], count), *stored[1:])
