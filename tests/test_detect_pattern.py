"""tightest() finds planted patterns, and what it finds always holds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsefx import detect
from sparsefx.detect import Found, ZeroCount, count_zeros, tightest
from sparsefx.spec import NM, Block, Pattern, Unstructured

EXAMPLES = settings(max_examples=80, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**31)


def dense(out: int, width: int, seed: int = 0) -> Tensor:
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(seed))
    return weight.masked_fill(weight == 0, 1)


def planted(pattern: Pattern, out: int, width: int, seed: int = 0) -> Tensor:
    weight = dense(out, width, seed)
    return weight.masked_fill(~pattern.keep(weight.abs()), 0)


@pytest.mark.parametrize(
    ("n", "m"), [(n, m) for m in (4, 8, 16) for n in range(1, m) if n / m <= 0.75]
)
def test_every_nm_with_a_quarter_of_zeros_is_found(n: int, m: int) -> None:
    assert tightest(planted(NM(n, m), 24, 6 * 16)) == Found(NM(n, m), 1 - n / m)


@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_blocks_are_found_at_their_size(size: int, sparsity: float) -> None:
    pattern = Block(size, size, sparsity)
    assert tightest(planted(pattern, 2 * size, 2 * size)) == Found(pattern, sparsity)


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("out", [1, 24])
def test_blocks_of_a_row_are_found(out: int, sparsity: float) -> None:
    pattern = Block(1, 16, sparsity)
    assert tightest(planted(pattern, out, 8 * 16)) == Found(pattern, sparsity)


def test_larger_blocks_win_over_those_of_a_row() -> None:
    weight = planted(Block(16, 16, 0.5), 64, 64)
    assert tightest(weight).pattern == Block(16, 16, 0.5)


@EXAMPLES
@given(SEEDS, st.integers(16, 40), st.integers(33, 70), st.floats(0.26, 0.9))
def test_unstructured_zeros_are_found_with_their_ratio(
    seed: int, out: int, width: int, sparsity: float
) -> None:
    weight = planted(Unstructured(sparsity), out, width, seed)
    found = tightest(weight)
    assert isinstance(found.pattern, Unstructured), seed
    assert found.pattern.sparsity == pytest.approx(1 - weight.count_nonzero() / weight.numel())


@EXAMPLES
@given(
    SEEDS,
    st.integers(0, 70),
    st.integers(0, 70),
    st.sampled_from([1, 4, 8, 16, 32]),
    st.floats(0, 1),
)
def test_what_is_found_holds(seed: int, out: int, width: int, step: int, density: float) -> None:
    """Keeping what the found pattern keeps, by magnitude, changes nothing."""
    width = width // step * step
    weight = dense(out, width, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    weight = weight.masked_fill(torch.rand(weight.shape, generator=generator) >= density, 0)
    found = tightest(weight)
    assert 0 <= found.sparsity <= 1
    assert (found.pattern is None) == bool(found.reason)
    if found.pattern is None:
        assert found.sparsity < 0.25 or not weight.numel(), seed
    else:
        assert found.pattern.misfit(weight.shape) is None, seed
        assert torch.equal(weight.masked_fill(~found.pattern.keep(weight.abs()), 0), weight), seed


@EXAMPLES
@given(SEEDS, st.integers(1, 6), st.integers(1, 9), st.integers(1, 300), st.floats(0, 1))
def test_counts_equal_a_plain_count_in_any_chunking(
    seed: int, block_rows: int, block_cols: int, chunk: int, density: float
) -> None:
    out, width = 16 * block_rows, 16 * block_cols
    generator = torch.Generator().manual_seed(seed)
    weight = (torch.rand(out, width, generator=generator) < density).float()
    weight[: out // 2, : width // 2] = 0
    whole = count_zeros(weight)
    assert whole.nonzeros == int(weight.sum())
    assert whole.fullest == {m: int(weight.view(-1, m).sum(1).max()) for m in (4, 8, 16)}
    for size, (zero, blocks) in whole.zero_blocks.items():
        tiles = weight.view(out // size, size, width // size, size).sum((1, 3))
        assert (zero, blocks) == (int((tiles == 0).sum()), tiles.numel())
    runs = weight.view(out, width // 16, 16).sum(2)
    assert whole.zero_runs == (int((runs == 0).sum()), runs.numel())
    divides = {size for size in (16, 32, 64, 128) if out % size == 0 and width % size == 0}
    assert set(whole.zero_blocks) == divides
    assert count_zeros(weight.t().contiguous().t()) == whole


def test_chunks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = planted(Block(64, 64, 0.5), 448, 128)
    whole = count_zeros(weight)
    monkeypatch.setattr(detect, "_CHUNK", 128 * 128)  # four chunks, the last one of 64 rows
    assert count_zeros(weight) == whole
    assert whole.zero_blocks[64] == (7, 14)
    assert 128 not in whole.zero_blocks


def test_few_zeros_are_left_alone_and_the_reason_has_the_share() -> None:
    weight = planted(Unstructured(0.012), 50, 40)
    assert tightest(weight) == Found(
        None, 0.012, "1.2 % of the weights are zero; a bitmap needs at least 25 %"
    )


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_empty_weights_have_no_pattern(shape: tuple[int, int]) -> None:
    assert tightest(torch.zeros(shape)).pattern is None
    assert count_zeros(torch.zeros(shape)) == ZeroCount(elements=0)


def test_one_row_all_zero_and_negative_zero() -> None:
    assert tightest(planted(NM(2, 4), 1, 32)).pattern == NM(2, 4)
    assert tightest(torch.zeros(1, 1)).sparsity == 1
    assert tightest(torch.zeros(4, 16)).pattern == NM(1, 16)
    assert tightest(planted(NM(1, 4), 4, 16).mul(-1)).pattern == NM(1, 4)  # zeros became -0.0


def test_a_row_length_that_no_m_divides_is_unstructured() -> None:
    assert tightest(planted(Unstructured(0.5), 8, 18)).pattern == Unstructured(0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_does_not_matter(dtype: torch.dtype) -> None:
    assert tightest(planted(NM(2, 8), 8, 32).to(dtype)).pattern == NM(2, 8)


def test_a_few_zeros_more_do_not_hide_two_four() -> None:
    weight = planted(NM(2, 4), 64, 64)
    weight[:, 3] = 0
    assert tightest(weight).pattern == NM(2, 4)


def test_many_zeros_more_make_a_bitmap_smaller_than_the_nm_that_holds() -> None:
    weight = planted(NM(2, 4), 64, 64)
    weight[8:] = weight[8:].masked_fill(~NM(1, 16).keep(weight[8:].abs()), 0)
    assert isinstance(tightest(weight).pattern, Unstructured)
