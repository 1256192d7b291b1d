"""One dense pass says of every trial what the meaning, run once for each trial, says."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparsefx.attention.meaning import kept_tiles, scores, skip_softmax_attention, softmax
from sparsefx.attention.spec import ORDERS, SkipSoftmax
from sparsefx.calibrate.attention.skips import (
    QUERY_TILES,
    SkipStatistics,
    Tables,
    chosen_tiles,
    decode_rows,
)
from sparsefx.calibrate.attention.tiles import Call
from sparsefx.calibrate.attention.trials import longer, trial_factors
from tests.attention_cases import Sizes, masks, skipping_inputs

TILE = (16, 16)
SQUARE = Sizes(queries=130, keys=130)
SCALE = 0.25


def call_of(sizes: Sizes, mask: Tensor | None, is_causal: bool, seed: int = 0) -> Call:
    q, k, v = skipping_inputs(sizes, seed)
    return Call(q, k, v, mask, is_causal, SCALE, TILE)


def statistics_of(call: Call, order: str) -> SkipStatistics:
    spec = SkipSoftmax(sparsity=0.5, order=order)
    found = SkipStatistics.empty(spec, call.q.shape[1], call.k.shape[1], TILE)
    assert found.add(call)
    return found


def brute_force(call: Call, order: str, factors: Tensor) -> Tables:
    """The tables of a call from the meaning, one trial after the other."""
    heads, kv_heads = call.q.shape[1], call.k.shape[1]
    operands = (call.q, call.k, call.v, call.mask)
    tables = Tables.empty(factors, heads, 1 if call.queries > 1 else heads // kv_heads)
    s = scores(call.q, call.k, call.mask, call.is_causal, call.scale, 0)
    nothing = torch.zeros(heads)
    everything = kept_tiles(s, kv_heads, nothing, *TILE, order)

    def attend(factor: Tensor) -> Tensor:
        return skip_softmax_attention(
            *operands, factor, factor, call.is_causal, call.scale, 0, *TILE, order
        )

    dense, mass = attend(nothing), softmax(s)
    tables.visible += everything.sum((0, 2, 3))
    tables.norm += dense.square().sum((0, 2, 3))
    tables.rows += (mass.sum(-1) > 0).sum((0, 2))
    for trial, number in enumerate(factors):
        factor = number.expand(heads)
        keep = kept_tiles(s, kv_heads, factor, *TILE, order)
        elements = keep.repeat_interleave(TILE[0], -2)[..., : call.queries, :]
        elements = elements.repeat_interleave(TILE[1], -1)[..., : call.keys]
        tables.skipped[:, trial] += (everything & ~keep).sum((0, 2, 3))
        tables.error[:, trial] += (attend(factor) - dense).square().sum((0, 2, 3))
        tables.lost[:, trial] += mass.masked_fill(elements, 0).sum((0, 2, 3))
    return tables


def assert_same(found: Tables, expected: Tables) -> None:
    for name, tensor in expected.tensors().items():
        torch.testing.assert_close(getattr(found, name), tensor, rtol=1e-9, atol=1e-15, msg=name)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_prefill_tables_equal_one_run_for_each_trial(
    order: str, kind: str, is_causal: bool
) -> None:
    call = call_of(SQUARE, masks(SQUARE, 1)[kind], is_causal)
    found = statistics_of(call, order).prefill
    assert_same(found, brute_force(call, order, found.factors))
    assert found.skipped[:, -1].sum() > 0.15 * found.visible.sum()


def test_a_prefill_behind_a_cache() -> None:
    call = call_of(Sizes(queries=50, keys=130), None, is_causal=True)
    found = statistics_of(call, "sink_diagonal").prefill
    assert_same(found, brute_force(call, "sink_diagonal", found.factors))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["none", "bool"])
def test_sampled_rows_are_decode_steps_of_their_length(order: str, kind: str) -> None:
    call = call_of(SQUARE, masks(SQUARE, 1)[kind], is_causal=True)
    found = statistics_of(call, order).decode
    expected = Tables.empty(found.factors, 4, 2)
    for sample in range(2):
        end = call.keys if call.mask is None else int(call.mask[sample].sum())
        for row in decode_rows(call, range(call.query_tiles)):
            keys = min(row + 1, end)
            step = Call(
                call.q[sample : sample + 1, :, row : row + 1],
                call.k[sample : sample + 1, :, :keys],
                call.v[sample : sample + 1, :, :keys],
                None,
                False,
                SCALE,
                TILE,
            )
            for name, tensor in brute_force(step, order, found.factors).tensors().items():
                if name != "factors":
                    getattr(expected, name).add_(tensor)
    assert_same(found, expected)
    assert found.skipped[:, -1].sum() > 0.15 * found.visible.sum()


def test_a_real_decode_call_counts_as_one() -> None:
    call = call_of(Sizes(queries=1, keys=130), None, is_causal=False)
    found = statistics_of(call, "sink_diagonal")
    assert_same(found.decode, brute_force(call, "sink_diagonal", found.decode.factors))
    assert found.prefill.visible.sum() == 0


def test_observed_tiles_are_a_sample_of_every_stretch() -> None:
    short = call_of(Sizes(batch=1, queries=250, keys=250), None, True)
    assert chosen_tiles(short, 1) == list(range(16))
    long = call_of(Sizes(batch=1, queries=800, keys=800), None, True)
    samples = [chosen_tiles(long, seed) for seed in range(40)]
    for tiles in samples:
        assert len(tiles) == QUERY_TILES and sorted(set(tiles)) == tiles and tiles[-1] < 50
        assert all(
            number * 50 // 16 <= tile <= (number + 1) * 50 // 16
            for number, tile in enumerate(tiles)
        )
    assert {tile for tiles in samples for tile in tiles} == set(range(50))


def test_a_sample_tells_what_all_tiles_tell() -> None:
    """Sums over a quarter of the tiles of many calls, against those over all of them."""
    sizes = Sizes(batch=1, heads=2, kv_heads=1, queries=1024, keys=1024)
    spec = SkipSoftmax(sparsity=0.5)
    sampled, whole = (SkipStatistics.empty(spec, 2, 1, TILE) for _ in range(2))
    call = call_of(sizes, None, is_causal=True)
    for _ in range(24):
        sampled.add(call)
    brute = brute_force(call, spec.order, sampled.prefill.factors)
    whole.prefill = brute
    for table in ("skipped", "error", "lost"):
        shares = [
            getattr(each.prefill, table) / each.prefill.rows[:, None] for each in (sampled, whole)
        ]
        middle = shares[1][:, -8:-2]
        assert float(((shares[0][:, -8:-2] - middle) / middle).abs().max()) < 0.1, table


def test_decode_steps_are_at_least_four_tiles_long() -> None:
    long = call_of(Sizes(batch=1, queries=300, keys=300), None, True)
    rows = decode_rows(long, range(long.query_tiles))
    assert max(rows) == 299 and min(rows) == 4 * TILE[1] - 1
    assert not decode_rows(call_of(Sizes(queries=1, keys=63), None, False), [0])


@pytest.mark.parametrize("order", ORDERS)
def test_lost_mass_is_bounded_by_the_skipped_keys(order: str) -> None:
    """Each skipped element weighs less than lambda, the largest element being 1."""
    call = call_of(SQUARE, None, is_causal=True)
    found = statistics_of(call, order).prefill
    limit = (found.factors.double() / call.keys).clamp(max=1)
    # A skipped tile has up to 16 rows of 16 keys.
    assert bool((found.lost <= found.skipped * TILE[0] * TILE[1] * limit + 1e-12).all())


def test_padding_rows_neither_vote_nor_count() -> None:
    """Padding on the left, hidden by the smallest float as models do: as if it were not there."""
    q, k, v = skipping_inputs(Sizes(batch=1, queries=128, keys=128), 3)
    short = Call(q, k, v, None, True, SCALE, TILE)

    def padded(x: Tensor) -> Tensor:
        noise = torch.randn((1, x.shape[1], 32, x.shape[3]), dtype=x.dtype)
        return torch.cat((noise, x), 2)

    seen = torch.zeros(160, 160, dtype=torch.bool)
    seen[32:, 32:] = torch.ones(128, 128).tril()
    hidden = torch.zeros(160, 160).masked_fill(~seen, torch.finfo(torch.float32).min)
    expected = statistics_of(short, "ascending").prefill
    for mask in (seen, hidden):
        long = Call(padded(q), padded(k), padded(v), mask[None, None], False, SCALE, TILE)
        found = Tables.empty(expected.factors * 160 / 128, 4, 1)  # of the same lambdas
        statistics = replace(statistics_of(long, "ascending"), prefill=found, fixed=True)
        statistics.add(long)
        for name in ("skipped", "error", "lost", "visible", "norm", "rows"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name))


def test_longer_inputs_add_trials_and_change_none() -> None:
    """Short then long gives, at every trial, the sum of both measured at that trial alone."""
    short = call_of(Sizes(queries=70, keys=70), None, True, seed=1)
    long = call_of(Sizes(queries=150, keys=150), None, True, seed=2)
    spec = SkipSoftmax(sparsity=0.5)
    both = SkipStatistics.empty(spec, 4, 2, TILE)
    both.add(short)
    both.add(long)
    assert both.keys == (70, 150)
    factors = both.prefill.factors
    assert torch.equal(factors, longer(trial_factors(70), 150)) and factors[-1] == 150
    parts = [brute_force(call, spec.order, factors) for call in (short, long)]
    for name in ("skipped", "error", "lost"):
        total = getattr(parts[0], name) + getattr(parts[1], name)
        torch.testing.assert_close(getattr(both.prefill, name), total, rtol=1e-9, atol=1e-15)


def test_half_precision_is_measured_in_float32() -> None:
    call = call_of(SQUARE, None, is_causal=True)
    half = replace(call, q=call.q.bfloat16(), k=call.k.bfloat16(), v=call.v.bfloat16())
    again = replace(half, q=half.q.float(), k=half.k.float(), v=half.v.float())
    found, expected = (statistics_of(each, "ascending").prefill for each in (half, again))
    assert torch.equal(found.skipped, expected.skipped)
    assert torch.equal(found.error, expected.error)


def test_nan_is_noticed() -> None:
    call = call_of(SQUARE, None, is_causal=True)
    call.k[0, 0, 5] = float("nan")
    assert not SkipStatistics.empty(SkipSoftmax(sparsity=0.5), 4, 2, TILE).add(call)
