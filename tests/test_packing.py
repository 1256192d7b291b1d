"""Every layout holds every kind of values, exactly; what was not rounded is not taken for codes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsefx.errors import ShapeMismatch
from sparsefx.nibbles import pack_nibbles, unpack_nibbles
from sparsefx.packing import Packing
from sparsefx.quantise import LARGEST, codes_of, quantised_rows, rounded, scales_of, values_of
from sparsefx.recover import recovered_scales
from sparsefx.spec import NM, Block, Pattern, Unstructured

SEEDS = st.integers(0, 2**31)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])
KINDS = st.sampled_from(["", *LARGEST])
EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True)
PACKINGS: st.SearchStrategy[tuple[Packing, Pattern]] = st.sampled_from(
    [
        (Packing("nm", n=2, m=4), NM(2, 4)),
        (Packing("nm", n=1, m=4), NM(1, 4)),
        (Packing("nm", n=3, m=8, group=16), NM(3, 8)),
        (Packing("nm", n=4, m=16, group=32), NM(4, 16)),
        (Packing("bitmap"), Unstructured(0.7)),
        (Packing("bitmap", group=16), Unstructured(0.4)),
        (Packing("block", block=(1, 16)), Block(1, 16, 0.5)),
        (Packing("block", block=(2, 3)), Block(2, 3, 0.4)),
    ]
)


def random_weight(
    seed: int, shape: tuple[int, int], pattern: Pattern, dtype: torch.dtype
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 0.05
    more = torch.rand(shape, generator=generator) < 0.1  # zeros beyond the pattern's
    return weight.masked_fill(more | ~pattern.keep(weight.abs()), 0).to(dtype)


@EXAMPLES
@given(SEEDS, PACKINGS, KINDS, DTYPES, st.integers(1, 4), st.sampled_from([48, 96]))
def test_packing_and_unpacking_are_inverses(
    seed: int,
    case: tuple[Packing, Pattern],
    kind: str,
    dtype: torch.dtype,
    pairs: int,
    width: int,
) -> None:
    packing, pattern = replace(case[0], values=kind), case[1]
    weight = random_weight(seed, (2 * pairs, width), pattern, dtype)
    if kind:
        weight = rounded(weight, kind, packing.tile(width))
    tensors = packing.pack(weight)
    assert len(tensors) == len(packing.parts)
    again = packing.unpack(tensors, width)
    assert again.dtype == dtype
    assert torch.equal(again, weight), seed
    if kind:
        assert tensors[-1].dtype == dtype


def test_layouts_of_codes_by_hand() -> None:
    weight = torch.tensor([[0, 7.0, 0, -3], [2, 0, 0, 0], [0, 0, 14, 6]])
    values, _, scales = Packing("nm", n=2, m=4, values="int4").pack(weight)
    # Codes 7, -3 | 7, 0 | 7, 3 at scales 1, 2/7, 2: low nibble first, two's complement.
    assert values.tolist() == [[7 | 13 << 4], [7], [7 | 3 << 4]]
    assert scales.flatten().tolist() == pytest.approx([1, 2 / 7, 2])
    values, bits, row_ptr, scales = Packing("bitmap", values="int4").pack(weight)
    assert values.tolist() == [7 | 13 << 4, 7, 7 | 3 << 4], "each row from a whole byte on"
    assert row_ptr.tolist() == [0, 2, 4, 6], "an odd row counts one more"
    assert bits.tolist() == [[0b1010], [0b0001], [0b1100]]
    values, columns, row_ptr, scales = Packing("block", block=(1, 2), values="int8").pack(weight)
    assert values.dtype == torch.int8
    assert values.tolist() == [[[0, 127]], [[0, -127]], [[127, 0]], [[126, 54]]]
    assert (columns.tolist(), row_ptr.tolist()) == ([0, 1, 0, 1], [0, 2, 3, 4])
    assert scales.tolist() == pytest.approx([7 / 127, 3 / 127, 2 / 127, 1 / 9]), (
        "6 is no code of 14 / 127"
    )


def test_fp8_codes_are_e4m3_numbers() -> None:
    weight = torch.tensor([[448.0, -1.5, 0, 2**-9]])
    values, _, _, scales = Packing("bitmap", values="fp8").pack(weight)
    assert values.dtype == torch.float8_e4m3fn
    assert values.float().tolist() == [448, -1.5, 2**-9]
    assert scales.tolist() == [[1]]


@EXAMPLES
@given(SEEDS, st.integers(0, 9), st.integers(1, 3))
def test_nibbles_round_trip(seed: int, count: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-7, 8, (2, rows, count), generator=generator).to(torch.int8)
    packed = pack_nibbles(codes)
    assert packed.shape == (2, rows, -(-count // 2))
    assert torch.equal(unpack_nibbles(packed, count), codes)


@EXAMPLES
@given(SEEDS, st.sampled_from([*LARGEST]), DTYPES, st.sampled_from([(1, 32), (1, 96), (4, 8)]))
def test_rounding_is_nearest_and_stays(
    seed: int, kind: str, dtype: torch.dtype, tile: tuple[int, int]
) -> None:
    weight = random_weight(seed, (8, 96), Unstructured(0.3), dtype)
    scales = scales_of(weight, kind, tile)
    found = rounded(weight, kind, tile)
    per_weight = scales.repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)
    # fp8 has three bits of fraction, from 2^-6 on; the dtype rounds the product once more.
    step = per_weight if kind != "fp8" else (weight.abs() / 8).maximum(per_weight * 2**-9)
    error, slack = (found - weight).abs().double(), weight.abs().double() * torch.finfo(dtype).eps
    assert (error <= 0.5 * step.double() * 1.0001 + 2 * slack).all(), seed
    assert codes_of(weight, scales, kind, tile).float().abs().max() <= LARGEST[kind]
    assert (found[weight == 0] == 0).all()


@EXAMPLES
@given(SEEDS, st.sampled_from([*LARGEST]), DTYPES, st.floats(0.6, 1))
def test_scales_are_recovered_where_the_largest_code_was_lost(
    seed: int, kind: str, dtype: torch.dtype, share: float
) -> None:
    """As after SparseGPT, which moves weights once the scales are fixed."""
    generator = torch.Generator().manual_seed(seed)
    weight = random_weight(seed, (6, 96), Unstructured(0.5), dtype)
    scales, tile = scales_of(weight, kind, (1, 32)), (1, 32)
    shrunk = weight * share + torch.randn(weight.shape, generator=generator).to(dtype) * 1e-3
    stored = values_of(codes_of(shrunk, scales, kind, tile), scales, tile, dtype)
    stored = stored.masked_fill(weight == 0, 0)
    found = recovered_scales(stored, kind, tile)
    assert found is not None, seed
    codes = codes_of(stored, found, kind, tile)
    assert torch.equal(values_of(codes, found, tile, dtype), stored), seed


@pytest.mark.parametrize("kind", LARGEST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_ordinary_weights_are_not_taken_for_codes(kind: str, dtype: torch.dtype) -> None:
    weight = random_weight(5, (64, 256), NM(2, 4), dtype)
    assert recovered_scales(weight, kind, (1, 128)) is None
    with pytest.raises(ShapeMismatch, match=f"not {kind} codes"):
        Packing("nm", n=2, m=4, values=kind, group=128).pack(weight)


def test_one_weight_that_is_no_code_is_seen_wherever_it_is() -> None:
    weight = rounded(random_weight(3, (300, 64), NM(2, 4), torch.bfloat16), "int4", (1, 32))
    assert recovered_scales(weight, "int4", (1, 32)) is not None
    weight[299, 63] = 0.0123
    assert recovered_scales(weight, "int4", (1, 32)) is None


@pytest.mark.parametrize("kind", LARGEST)
def test_zeros_and_no_elements(kind: str) -> None:
    packing = Packing("bitmap", values=kind, group=16)
    for shape in ((3, 32), (0, 32)):
        zeros = torch.zeros(shape)
        if zeros.numel():
            assert torch.equal(packing.unpack(packing.pack(zeros), 32), zeros)
        assert torch.equal(rounded(zeros, kind, (1, 16)), zeros)


@pytest.mark.parametrize("kind", ["", *LARGEST])
@pytest.mark.parametrize(
    "packing", [Packing("nm", n=2, m=4), Packing("bitmap"), Packing("block", block=(2, 4))]
)
def test_a_weight_of_zeros_alone_has_nothing_to_store(packing: Packing, kind: str) -> None:
    stored = replace(packing, values=kind)
    assert torch.equal(stored.unpack(stored.pack(torch.zeros(4, 8)), 8), torch.zeros(4, 8))


def test_rows_of_x_become_whole_numbers_and_a_scale() -> None:
    x = torch.tensor([[1.0, -2.54, 0.03, 0.01], [0, 0, 0, 0]])
    codes, scales = quantised_rows(x)
    assert codes.tolist() == [[50, -127, 2, 0], [0, 0, 0, 0]], "half to even"
    assert scales.flatten().tolist() == pytest.approx([0.02, 0])


def test_alternatives_go_from_the_smallest_to_the_plainest() -> None:
    nm = Packing("nm", n=2, m=4, values="int4", group=128)
    assert nm.alternatives() == (
        Packing("bitmap", values="int4", group=128),
        Packing("nm", n=2, m=4),
        Packing("bitmap"),
    )
    runs = Packing("block", block=(1, 16), values="int8")
    assert runs.alternatives()[0] == Packing("bitmap", values="int8", group=16)
    square = Packing("block", block=(16, 16), values="int8")
    assert square.alternatives() == (Packing("bitmap"), Packing("block", block=(16, 16)))
    assert Packing("bitmap").alternatives() == ()
