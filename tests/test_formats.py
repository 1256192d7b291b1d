"""Packing and unpacking are exact inverses for every pattern, shape and dtype."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsefx.errors import ShapeMismatch
from sparsefx.formats import (
    PackedNM,
    index_bits,
    index_columns,
    nm_count,
    pack_bitmap,
    pack_bits,
    pack_block,
    pack_nm,
    unpack_bitmap,
    unpack_bits,
    unpack_block,
    unpack_nm,
)
from sparsefx.spec import NM

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
SEEDS = st.integers(0, 2**31)
EXAMPLES = settings(max_examples=100, deadline=None, derandomize=True)


def random_weight(seed: int, out: int, width: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, width, generator=generator).to(dtype)


def keep_at(seed: int, weight: Tensor, density: float) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(weight.shape, generator=generator) < density


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@EXAMPLES
@given(SEEDS, st.integers(1, 9), st.integers(1, 4), st.data(), DTYPES, st.booleans())
def test_nm_round_trip(
    seed: int, out: int, groups: int, data: st.DataObject, dtype: torch.dtype, transposed: bool
) -> None:
    m = data.draw(st.sampled_from([4, 8, 16]))
    n = data.draw(st.integers(1, m - 1))
    weight = random_weight(seed, out, groups * m, dtype)
    keep = NM(n, m).keep(weight.abs().float()) & keep_at(seed, weight, 0.8)
    weight = weight.masked_fill(~keep, 0)
    if transposed:
        weight = weight.t().contiguous().t()
    packed = pack_nm(weight, n, m)
    assert packed.values.shape == (out, groups * n)
    assert packed.index.shape == (out, -(-groups * n * index_bits(m) // 8))
    assert packed.values.is_contiguous() and packed.index.is_contiguous()
    assert same_bits(unpack_nm(packed, n, m), weight.contiguous())


@EXAMPLES
@given(SEEDS, st.integers(1, 5), st.sampled_from([4, 8, 16]))
def test_nm_columns_ascend_within_each_group(seed: int, out: int, m: int) -> None:
    n = m // 2
    weight = random_weight(seed, out, 2 * m, torch.float32)
    weight = weight.masked_fill(~NM(n, m).keep(weight.abs()), 0)
    weight[0] = 0
    columns = index_columns(pack_nm(weight, n, m).index, m)[:, : 2 * n].view(-1, n)
    assert (columns[:, 1:] > columns[:, :-1]).all()
    assert int(columns.max()) < m


@EXAMPLES
@given(SEEDS, st.integers(1, 9), st.integers(1, 40), st.floats(0, 1), DTYPES, st.booleans())
def test_bitmap_round_trip(
    seed: int, out: int, width: int, density: float, dtype: torch.dtype, transposed: bool
) -> None:
    weight = random_weight(seed, out, width, dtype)
    weight = weight.masked_fill(~keep_at(seed, weight, density), 0)
    if transposed:
        weight = weight.t().contiguous().t()
    packed = pack_bitmap(weight)
    counts = (weight != 0).sum(1)
    assert packed.values.numel() == int(counts.sum())
    assert torch.equal(packed.row_ptr.diff(), counts.int())
    assert same_bits(unpack_bitmap(packed, width), weight.contiguous())


@EXAMPLES
@given(
    SEEDS,
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(1, 7),
    st.integers(1, 7),
    st.floats(0, 1),
    DTYPES,
    st.booleans(),
)
def test_block_round_trip(
    seed: int,
    high: int,
    wide: int,
    rows: int,
    cols: int,
    density: float,
    dtype: torch.dtype,
    transposed: bool,
) -> None:
    weight = random_weight(seed, high * rows, wide * cols, dtype)
    tiles = keep_at(seed, torch.empty(high, wide), density)
    keep = tiles.repeat_interleave(rows, 0).repeat_interleave(cols, 1)
    weight = weight.masked_fill(~keep | ~keep_at(seed + 1, weight, 0.8), 0)
    if transposed:
        weight = weight.t().contiguous().t()
    filled = weight.reshape(high, rows, wide, cols).ne(0).any(3).any(1)
    packed = pack_block(weight, rows, cols)
    assert packed.values.shape == (int(filled.sum()), rows, cols)
    assert packed.values.is_contiguous()
    assert torch.equal(packed.row_ptr.diff(), filled.sum(1).int())
    assert torch.equal(packed.columns, filled.nonzero()[:, 1].int()), "ascending in each row"
    assert same_bits(unpack_block(packed, wide * cols), weight.contiguous())


def test_block_layout_by_hand() -> None:
    weight = torch.tensor([[0, 0, 1, 2], [0, 0, 3, -0.0], [5, 0, 6, 0], [0, 0, 0, 0]])
    values, columns, row_ptr = pack_block(weight, 2, 2)
    assert values.tolist() == [[[1, 2], [3, 0]], [[5, 0], [0, 0]], [[6, 0], [0, 0]]]
    assert values[0, 1, 1].signbit(), "what lies in a stored block keeps its bits"
    assert (columns.tolist(), row_ptr.tolist()) == ([1, 0, 1], [0, 1, 3])
    assert columns.dtype == row_ptr.dtype == torch.int32


def test_a_weight_without_nonzeros_is_no_block() -> None:
    packed = pack_block(torch.zeros(4, 6), 2, 3)
    assert (packed.values.shape, packed.row_ptr.tolist()) == ((0, 2, 3), [0, 0, 0])
    assert torch.equal(unpack_block(packed, 6), torch.zeros(4, 6))


@EXAMPLES
@given(SEEDS, st.integers(1, 5), st.integers(1, 40))
def test_bits_round_trip_lowest_bit_first(seed: int, out: int, width: int) -> None:
    keep = keep_at(seed, torch.empty(out, width), 0.5)
    bits = pack_bits(keep)
    assert bits.shape == (out, -(-width // 8))
    assert torch.equal(unpack_bits(bits, width), keep)
    expected = sum(int(keep[0, column]) << column for column in range(min(8, width)))
    assert int(bits[0, 0]) == expected


def test_nm_layout_by_hand() -> None:
    weight = torch.tensor([[0, 5, 0, 7, 1, 2, 0, 0], [0, 0, 3, 0, 0, 0, 0, 0]]).float()
    values, index = pack_nm(weight, 2, 4)
    assert values.tolist() == [[5, 7, 1, 2], [0, 3, 0, 0]]
    # Columns 1,3,0,1 and 0,2,0,1: two bits each, the first one lowest.
    assert index.tolist() == [[1 | 3 << 2 | 0 << 4 | 1 << 6], [0 | 2 << 2 | 0 << 4 | 1 << 6]]


def test_non_finite_values_and_payloads_survive() -> None:
    weight = torch.tensor([[float("nan"), 0, float("-inf"), 0]])
    assert same_bits(unpack_nm(pack_nm(weight, 2, 4), 2, 4), weight)
    assert same_bits(unpack_bitmap(pack_bitmap(weight), 4), weight)


def test_nm_count_is_the_fullest_group() -> None:
    weight = torch.tensor([[1.0, 0, 0, 0, 1, 1, 1, 0]])
    assert nm_count(weight, 4) == 3
    assert nm_count(weight, 8) == 4
    assert nm_count(weight, 16) is None
    assert nm_count(torch.zeros(2, 4), 4) == 0


@pytest.mark.parametrize(
    ("weight", "n", "m", "says"),
    [
        (torch.ones(2, 8), 2, 4, "holds 4 nonzeros, more than 2"),
        (torch.zeros(2, 6), 2, 4, "not a multiple of m=4"),
        (torch.zeros(2, 6), 2, 6, "is not packable"),
        (torch.zeros(2, 8), 4, 4, "is not packable"),
        (torch.zeros(8), 2, 4, "not a multiple of m=4"),
    ],
)
def test_what_does_not_fit_is_refused(weight: Tensor, n: int, m: int, says: str) -> None:
    with pytest.raises(ShapeMismatch, match=says):
        pack_nm(weight, n, m)


@pytest.mark.parametrize("shape", [(2, 6), (3, 8), (8,)])
def test_what_is_no_grid_of_blocks_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeMismatch, match="not a grid of 2 x 4 blocks"):
        pack_block(torch.zeros(shape), 2, 4)


def test_bitmap_takes_matrices_only() -> None:
    with pytest.raises(ShapeMismatch, match="a bitmap holds a matrix"):
        pack_bitmap(torch.zeros(2, 2, 2))


def test_unpacking_an_index_outside_its_group_never_writes_outside() -> None:
    hostile = PackedNM(torch.ones(1, 2), torch.tensor([[0x98]], dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="out of bounds"):
        unpack_nm(hostile, 2, 8)
