"""2:4, 1:4 and sparser N:M on sparse tensor cores: `mma_sp_template`, for few rows of x.

Never run on hardware yet: the order of fragments follows the PTX ISA, and the guard compares
numbers before it chooses, so that a wrong order could cost speed, never a result.
"""

import json
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from sparsefx import formats
from sparsefx.codegen.triton import mma_sp_asm, mma_sp_pack, scales
from sparsefx.codegen.triton.form import POWERS, Call, Packed, Problem, cdiv, finished, power
from sparsefx.codegen.triton.hardware import SPARSE_TENSOR_CORES
from sparsefx.codegen.triton.mma_sp_asm import COLUMNS, STEPS, Program
from sparsefx.codegen.triton.mma_sp_pack import ROWS, Groups
from sparsefx.codegen.triton.variant import Settings, Variant
from sparsefx.formats import PackedNM
from sparsefx.nibbles import unpack_nibbles
from sparsefx.target import LinearSpec

MOST_ROWS = 64
_PTX_TYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}


@dataclass(frozen=True)
class MmaSpForm:
    """Kernels whose weight stays compressed up to the tensor core.

    Settings: slabs (tiles of 16 rows of W a warp), tall and deep (warps over rows and columns),
    split (programs over columns), direct (1: lanes exchange words of x; 0: x is re-arranged first).
    """

    name = "mma_sp"
    layout = "nm"
    needs = SPARSE_TENSOR_CORES
    interpretable = False  # inline PTX
    settings = MappingProxyType(
        {
            "slabs": (1, 2),
            "tall": (1, 2, 4, 8),
            "deep": (1, 2, 4, 8, 16),
            "split": POWERS[:5],
            "direct": (0, 1),
        }
    )

    def misfit(self, spec: LinearSpec) -> str | None:
        """Why it cannot compute this linear, or None."""
        if spec.n > 2:
            return f"{spec.n}:{spec.m} is not contained in 2:4, which sparse tensor cores read"
        if spec.dtype not in _PTX_TYPES:
            return f"sparse tensor cores of 16 bits do not compute {spec.dtype}"
        if spec.in_features % 8:
            return f"{spec.in_features} input features are not a multiple of 8"
        if spec.rows > MOST_ROWS:
            return f"{spec.rows} rows are more than {MOST_ROWS}, up to which this kernel pays"
        if spec.values and (spec.values not in ("int8", "int4") or spec.n == 1):
            return f"{spec.n}:{spec.m} with {spec.values} values is not rebuilt in registers"
        if spec.values and spec.group and not _fits(spec.group):
            return f"groups of {spec.group} columns do not tile blocks of {COLUMNS}"
        return None

    def tunings(self, spec: LinearSpec) -> tuple[Settings, ...]:
        """Enough warps to keep memory busy; with many rows, fewer programs that read x again."""
        blocks, strips = cdiv(spec.in_features, COLUMNS), cdiv(spec.out_features, ROWS)
        deep = power(cdiv(blocks, 2), 1, 16)
        if spec.rows <= 16:
            found = [(1, 1, deep, 1, 1), (1, 1, max(1, deep // 2), 1, 1), (2, 1, deep // 2, 1, 1)]
            found += [(1, 2, deep // 2, 1, 1), (1, 1, deep // 2, 2, 1), (1, 1, deep // 2, 4, 1)]
        else:
            tall = 4 if strips >= 512 else 2
            found = [(2, tall, 4, 1, 0), (2, tall, 4, 2, 0), (1, tall, 4, 1, 0), (2, tall, 2, 4, 0)]
            found += [(1, tall, 4, 2, 0), (2, 1, 8, 1, 1)]
        names = ("slabs", "tall", "deep", "split", "direct")
        usable = [each for each in found if each[2] >= 1 and each[2] * each[3] <= blocks]
        usable = usable or [(1, 1, 1, 1, 1)]
        return tuple(dict.fromkeys(tuple(zip(names, each, strict=True)) for each in usable))

    def arrange(self, variant: Variant, packed: Packed, in_features: int) -> Packed:
        """Fragments, metadata and, for codes, scales: all int32."""
        groups = mma_sp_pack.padded(_groups(variant, packed, in_features), self._rows(variant))
        words = mma_sp_pack.fragments(groups, variant.values)
        if variant.n == 1:
            return (words, mma_sp_pack.single_metadata(groups.columns))
        stored = (words, mma_sp_pack.metadata(groups.columns))
        if not variant.values:
            return stored
        tiles, blocks = words.shape[:2]
        return (*stored, scales.words(packed[2], variant.group, tiles, blocks))

    def weight(self, variant: Variant, packed: Packed, out: int, in_features: int) -> Tensor:
        """The dense weight [out, in_features] of the stored tensors, in the variant's dtype."""
        values = mma_sp_pack.unfragment(packed[0], variant.n, variant.values, variant.dtype)
        if variant.n == 1:
            columns = mma_sp_pack.unsingle_metadata(packed[1])
        else:
            columns = mma_sp_pack.unmetadata(packed[1])
        dense = values.new_zeros((*columns.shape[:2], 4)).scatter_(-1, columns, values).flatten(1)
        dense = dense[:out, :in_features]
        if not variant.values:
            return dense
        factor = scales.from_words(packed[2], variant.dtype, in_features)
        return (dense.float() * factor[:out]).to(variant.dtype)

    def text(self, variant: Variant) -> str:
        """The inline PTX of the variant."""
        program = _program(variant)
        texts = {
            "MULTIPLY": mma_sp_asm.multiply(program),
            "MULTIPLY_OPERANDS": mma_sp_asm.constraints(program),
            "EXCHANGE": mma_sp_asm.exchange(program.is_single),
            "EXCHANGE_OPERANDS": mma_sp_asm.EXCHANGE_CONSTRAINTS,
        }
        return "\n".join(
            f'{name} = tl.constexpr("""\\\n{text}""")'
            if "\n" in text
            else f"{name} = tl.constexpr({json.dumps(text)})"
            for name, text in texts.items()
        )

    def calls(self, variant: Variant, problem: Problem) -> tuple[Call, ...]:
        """The kernel; before it, perhaps, x in fragment order; behind it the sum of a split."""
        fragments, metadata, *factors = problem.packed
        tiles, blocks, loads = fragments.shape[:3]
        count = power(cdiv(problem.rows, 8), 1, 8)
        slabs, tall = variant.setting("slabs", 1), variant.setting("tall", 1)
        deep, split = variant.setting("deep", 4), variant.setting("split", 1)
        x, words = _words(problem.x), problem.in_features // 2
        row_tiles = cdiv(problem.rows, 8 * count)
        # the exchange of 8 tiles would cost more instructions than the product
        is_direct = bool(variant.setting("direct", 1)) and slabs * count <= 8
        before: tuple[Call, ...] = ()
        if not is_direct:
            shape = (row_tiles, blocks, count, STEPS, 128)
            ordered = torch.empty(shape, dtype=torch.int32, device=x.device)
            sizes: dict[str, int | str] = {"STEPS": STEPS, "TILES": count, "num_warps": 4}
            arguments = (x, ordered, problem.rows, words)
            before = (Call((blocks, row_tiles * count), arguments, sizes, "fragments_of"),)
            x = ordered
        options: dict[str, int | str] = {
            "LOADS": loads,
            "SCALED": int(variant.values != ""),
            "SLABS": slabs,
            "TILES": count,
            "TALL": tall,
            "DEEP": deep,
            "DIRECT": int(is_direct),
            "EVEN": int(blocks % (deep * split) == 0 and problem.in_features % COLUMNS == 0),
            "num_warps": tall * deep,
        }
        if variant.values or variant.n == 1:
            # the true limit: left alone, ptxas 12.8 spills a word or two where that makes room for
            # another program on a multiprocessor
            options["maxnreg"] = min(255, 65536 // (32 * tall * deep))
        grid = (tiles // (slabs * tall), row_tiles, split)
        tensors = (x, fragments, metadata, factors[0] if factors else None)
        sizes_of = (problem.rows, problem.out_features, words, blocks)
        call = Call(grid, (*tensors, problem.bias, problem.extras, problem.y, *sizes_of), options)
        return (*before, *finished(variant, problem, call, split))

    def _rows(self, variant: Variant) -> int:
        """Rows of W in a program."""
        return ROWS * variant.setting("slabs", 1) * variant.setting("tall", 1)


def _program(variant: Variant) -> Program:
    return Program(_PTX_TYPES[variant.dtype], variant.n == 1, variant.values)


def _words(x: Tensor) -> Tensor:
    """x as int32 words; copied if it is a slice whose address is no multiple of 16 bytes.

    By what it knows of addresses Triton lays loads of 128 bits, and with them the lanes, out.
    """
    return (x.clone() if x.data_ptr() % 16 else x).view(-1).view(torch.int32)


def _fits(group: int) -> bool:
    return group in (64, 128) or group % COLUMNS == 0


def _groups(variant: Variant, packed: Packed, in_features: int) -> Groups:
    """The weight by groups of four columns; sparser patterns in wider groups are re-packed."""
    n, m = variant.n, variant.m
    columns = formats.index_columns(packed[1], m)
    values = packed[0]
    if variant.values == "int4":
        values = unpack_nibbles(values, in_features // m * n)
    out, kept = values.shape
    if m != 4:
        dense = formats.unpack_nm(PackedNM(values, packed[1]), n, m)
        values, index = formats.pack_nm(dense, n, 4)
        columns, kept = formats.index_columns(index, 4), values.shape[1]
    return Groups(values.view(out, -1, n), columns[:, :kept].long().view(out, -1, n))
