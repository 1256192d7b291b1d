"""How each tensor lies in a sparse checkpoint, as data: `Layout` and its JSON text.

A tensor called `w` of shape S is viewed as a matrix [rows, columns] whose columns run along `axis`
of S, and stored as one of

    dense   "w"         as it is
    nm      "w:values"  [rows, columns * n / m]    "w:index"  uint8 [rows, ceil(values * bits / 8)]
    bitmap  "w:values"  [nonzeros]                 "w:bits"   uint8 [rows, ceil(columns / 8)]
    keep    "w:keep"    uint8 [rows, ceil(columns / 8)]: the mask alone

in the encodings of `sparsefx.formats`. nm and bitmap may hold codes (`sparsefx.quantise`): int8,
fp8 as e4m3, or int4 two a byte, a row of nm and all of a bitmap from a whole byte on, and beside

            "w:scales"  [ceil(rows / r), ceil(columns / c)] of tiles of r x c

in the tensor's dtype. The JSON is the safetensors metadata called "sparsefx".
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor

from sparsefx.formats import NM_GROUPS, index_bits

KEY = "sparsefx"
VERSION = 1
WEIGHTS_FILE = "model.safetensors"
ANNOTATIONS_FILE = "annotations.toml"
RECIPE_FILE = "recipe.toml"

# Types that may be packed, with their names in a safetensors header.
PACKABLE = {
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
STORED_NAMES = PACKABLE | {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORED_NAMES}
_KINDS = ("dense", "nm", "bitmap", "keep")
_CODES = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Entry:
    """One tensor: how it is stored and what it unpacks to. `n`, `m` are 0 unless kind is "nm".

    values: "", or "int8", "int4", "fp8" codes with a scale for each `tile` of the matrix.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    axis: int = 0
    n: int = 0
    m: int = 0
    values: str = ""
    tile: tuple[int, int] = (0, 0)

    @property
    def columns(self) -> int:
        """Length of the matrix's rows."""
        return self.shape[self.axis]

    @property
    def rows(self) -> int:
        """Number of the matrix's rows."""
        return prod(self.shape) // self.columns if prod(self.shape) else 0

    def parts(self) -> dict[str, tuple[torch.dtype, tuple[int | None, ...]]]:
        """Suffix -> dtype and shape of each stored tensor; a None size is free."""
        if self.kind == "dense":
            return {"": (self.dtype, self.shape)}
        bits = (torch.uint8, (self.rows, -(-self.columns // 8)))
        if self.kind == "keep":
            return {":keep": bits}
        dtype = _CODES.get(self.values, self.dtype)
        if self.kind == "bitmap":
            return {":values": (dtype, (None,)), ":bits": bits, **self._scales()}
        width = -(-self.kept // 2) if self.values == "int4" else self.kept
        index = (torch.uint8, (self.rows, -(-self.kept * index_bits(self.m) // 8)))
        return {":values": (dtype, (self.rows, width)), ":index": index, **self._scales()}

    @property
    def kept(self) -> int:
        """Values in a row of an N:M matrix."""
        return self.columns // self.m * self.n

    def _scales(self) -> dict[str, tuple[torch.dtype, tuple[int | None, ...]]]:
        if not self.values:
            return {}
        high, wide = self.tile
        return {":scales": (self.dtype, (-(-self.rows // high), -(-self.columns // wide)))}


@dataclass(frozen=True)
class Layout:
    """Tensor name -> Entry, and further names of tied tensors -> the name they are stored under."""

    entries: Mapping[str, Entry]
    aliases: Mapping[str, str] = field(default_factory=dict)
    masks_only: bool = False

    def to_json(self) -> str:
        """The text that `layout_from_json` reads."""
        tensors = {name: _entry_to_dict(entry) for name, entry in self.entries.items()}
        return json.dumps(
            {
                "version": VERSION,
                "masks_only": self.masks_only,
                "tensors": tensors,
                "aliases": dict(self.aliases),
            }
        )


class BadLayout(ValueError):
    """A layout text that breaks a rule; the reader turns it into CorruptCheckpoint."""


def as_matrix(tensor: Tensor, axis: int) -> Tensor:
    """`tensor`, of at least one dimension, as [rows, columns] with columns along `axis`."""
    columns = tensor.shape[axis]
    return tensor.movedim(axis, -1).reshape(tensor.numel() // columns, columns)


def from_matrix(matrix: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    """Inverse of `as_matrix`; a view."""
    moved = [size for dim, size in enumerate(shape) if dim != axis]
    return matrix.view(*moved, shape[axis]).movedim(-1, axis)


def strict_json(text: str | bytes) -> object:
    """Parses JSON in which no key may occur twice in one object. Raises BadLayout."""
    try:
        parsed: object = json.loads(text, object_pairs_hook=_unique)
    except BadLayout:
        raise
    except (ValueError, RecursionError) as error:
        raise BadLayout(f"its description is not JSON: {error}") from error
    return parsed


def layout_from_json(text: str) -> Layout:
    """Parses and checks a layout on its own terms. Raises BadLayout."""
    table = strict_json(text)
    if not isinstance(table, dict) or table.get("version") != VERSION:
        raise BadLayout(f"it is not of version {VERSION} of the sparsefx layout")
    if set(table) != {"version", "masks_only", "tensors", "aliases"}:
        raise BadLayout("its layout has missing or unknown fields")
    tensors, aliases, masks_only = table["tensors"], table["aliases"], table["masks_only"]
    if not (isinstance(tensors, dict) and isinstance(aliases, dict) and type(masks_only) is bool):
        raise BadLayout("its layout has fields of a wrong type")
    entries = {name: _entry_from(name, fields) for name, fields in tensors.items()}
    for name, entry in entries.items():
        if (entry.kind == "keep") != masks_only:
            raise BadLayout(f"tensor {name} mixes masks with weights")
    for alias, name in aliases.items():
        if alias in entries or not isinstance(name, str) or name not in entries:
            raise BadLayout(f"alias {alias} does not stand for a stored tensor")
    return Layout(entries, aliases, masks_only)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise BadLayout("its description holds one name twice")
    return table


def _entry_to_dict(entry: Entry) -> dict[str, object]:
    fields: dict[str, object] = {
        "kind": entry.kind,
        "shape": entry.shape,
        "dtype": str(entry.dtype).removeprefix("torch."),
    }
    if entry.kind != "dense":
        fields["axis"] = entry.axis
    if entry.kind == "nm":
        fields |= {"n": entry.n, "m": entry.m}
    if entry.values:
        fields |= {"values": entry.values, "tile": entry.tile}
    return fields


def _entry_from(name: str, fields: object) -> Entry:
    if not isinstance(fields, dict) or fields.get("kind") not in _KINDS:
        raise BadLayout(f"tensor {name} is of no known kind")
    kind, shape, dtype = fields["kind"], fields.get("shape"), fields.get("dtype")
    numbers = {"dense": (), "nm": ("axis", "n", "m")}.get(kind, ("axis",))
    codes = ("values", "tile") if kind in ("nm", "bitmap") and "values" in fields else ()
    if set(fields) != {"kind", "shape", "dtype", *numbers, *codes}:
        raise BadLayout(f"tensor {name} has missing or unknown fields")
    if not isinstance(shape, list) or len(shape) > 64 or not all(map(_is_size, shape)):
        raise BadLayout(f"tensor {name} has no valid shape")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise BadLayout(f"tensor {name} has no known dtype")
    if not all(type(fields[number]) is int for number in numbers):
        raise BadLayout(f"tensor {name} has a pattern that is not made of whole numbers")
    entry = Entry(kind, tuple(shape), _DTYPES[dtype], *(fields[number] for number in numbers))
    _check_packing(name, entry)
    return _with_codes(name, entry, fields["values"], fields["tile"]) if codes else entry


def _with_codes(name: str, entry: Entry, values: object, tile: object) -> Entry:
    if not isinstance(values, str) or values not in _CODES:
        raise BadLayout(f"tensor {name} has no known values")
    if not isinstance(tile, list) or len(tile) != 2 or not all(map(_is_size, tile)):
        raise BadLayout(f"tensor {name} has no valid tile")
    high, wide = tile
    if not 0 < high <= entry.rows or not 0 < wide <= entry.columns:
        raise BadLayout(f"tensor {name} cannot have a scale for {high} x {wide}")
    return replace(entry, values=values, tile=(high, wide))


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _check_packing(name: str, entry: Entry) -> None:
    if entry.kind == "dense":
        return
    if not 0 <= entry.axis < len(entry.shape) or not prod(entry.shape):
        raise BadLayout(f"tensor {name} of shape {entry.shape} cannot be packed along {entry.axis}")
    if entry.dtype not in PACKABLE:
        raise BadLayout(f"tensor {name} of type {entry.dtype} cannot be packed")
    packable = entry.m in NM_GROUPS and 0 < entry.n < entry.m and entry.columns % entry.m == 0
    if entry.kind == "nm" and not packable:
        raise BadLayout(f"tensor {name} cannot be {entry.n}:{entry.m}")
