"""What the sparse attention operators mean: against the algorithms of the papers, in float64."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from sparsefx.attention import meaning
from sparsefx.attention.dense import dense_attention
from sparsefx.attention.operators import ATTENTION_OPS, BLOCK, SKIP_SOFTMAX, THETA
from tests.attention_cases import Sizes, masks, skipping_inputs

NEVER = -math.inf
SHAPES = (
    Sizes(),
    Sizes(heads=3, kv_heads=3, queries=150, keys=150),
    Sizes(heads=6, kv_heads=1, queries=5, keys=200, dim=8),
    Sizes(queries=1, keys=150),
)
ORDERS = ("ascending", "sink_diagonal")
CASES = list(itertools.product(range(len(SHAPES)), ("none", "bool", "float"), ORDERS))


def visit(tiles: int, last: int, order: str) -> list[int]:
    """Tile numbers in visiting order; `last` is the last tile that the row tile sees."""
    return list(range(tiles)) if order == "ascending" else [0, *range(last, 0, -1)]


def flash(
    s: Tensor, v: Tensor, limits: Tensor, block_k: int, order: str
) -> tuple[Tensor, list[int], float]:
    """One row tile, by the algorithm of arXiv 2512.12087 as it is written: a loop with state.

    s [rows, keys] scores, v [rows, keys, dim], limits [rows] ln(lambda). Returns the output, the
    computed tiles, and the largest share of softmax mass that a row lost.
    """
    rows, keys = s.shape
    top = torch.full((rows,), NEVER, dtype=torch.float64)
    total, out = torch.zeros(rows, dtype=torch.float64), torch.zeros(rows, v.shape[-1]).double()
    computed = []
    seen = [
        j for j in range(-(-keys // block_k)) if s[:, j * block_k : (j + 1) * block_k].max() > NEVER
    ]
    for j in visit(-(-keys // block_k), max(seen, default=0), order):
        tile = s[:, j * block_k : (j + 1) * block_k]
        best = tile.amax(1)
        votes = [
            best[r] > NEVER and (top[r] == NEVER or best[r] - top[r] >= limits[r])
            for r in range(rows)
        ]
        if not any(votes):
            continue
        computed.append(j)
        new = torch.maximum(top, best)
        safe = new.masked_fill(new == NEVER, 0)
        p, fade = (tile - safe[:, None]).exp(), (top - safe).exp()
        total = total * fade + p.sum(1)
        out = out * fade[:, None] + torch.einsum(
            "rk,rkd->rd", p, v[:, j * block_k :][:, : p.shape[1]]
        )
        top = new
    kept = torch.zeros(keys, dtype=torch.bool)
    for j in computed:
        kept[j * block_k : (j + 1) * block_k] = True
    lost = meaning.softmax(s)[:, ~kept].sum(1).max() if keys else 0.0
    return out / total.masked_fill(total == 0, 1)[:, None], computed, float(lost)


@pytest.mark.parametrize(("shape", "kind", "order"), CASES)
def test_skip_softmax_is_flash_attention_that_skips(shape: int, kind: str, order: str) -> None:
    sizes = SHAPES[shape]
    block_q, block_k, window = 32, 16, 0
    q, k, v = skipping_inputs(sizes, seed=shape)
    mask = masks(sizes, seed=shape)[kind]
    factor = torch.tensor([0.9 * sizes.keys * 0.5**h for h in range(sizes.heads)])
    s = meaning.scores(q, k, mask, True, 0.5, window)
    result = meaning.skip_softmax_attention(
        q, k, v, mask, factor, factor, True, 0.5, window, block_q, block_k, order
    )
    keep = meaning.kept_tiles(s, sizes.kv_heads, factor, block_q, block_k, order)
    limits = (factor.double() / sizes.keys).log().clamp(max=0)
    group = sizes.heads // sizes.kv_heads
    wide = v.repeat_interleave(group, 1)
    skipped = 0
    for b, kv in itertools.product(range(sizes.batch), range(sizes.kv_heads)):
        heads = list(range(kv * group, (kv + 1) * group))
        # with one query, the heads of a group are the rows of one tile
        parts = [heads] if sizes.queries == 1 else [[head] for head in heads]
        for part, row in itertools.product(parts, range(-(-sizes.queries // block_q))):
            rows = slice(row * block_q, (row + 1) * block_q)
            tile = torch.cat([s[b, h, rows] for h in part])
            values = torch.cat([wide[b, h].expand(s[b, h, rows].shape[0], -1, -1) for h in part])
            limit = torch.cat([limits[h].expand(s[b, h, rows].shape[0]) for h in part])
            expected, computed, lost = flash(tile, values, limit, block_k, order)
            got = torch.cat([result[b, h, rows] for h in part])
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
            for h in part:
                assert keep[b, h, row].nonzero().flatten().tolist() == sorted(computed)
            visible = (meaning.tile_maxima(tile, block_k) > NEVER).any(0)
            gone = int(visible.sum()) - len(computed)
            assert lost <= gone * block_k * float(limit.max().exp()) + 1e-12
            skipped += gone
    assert skipped > 0, "nothing was skipped: the test shows nothing"


@pytest.mark.parametrize("order", ORDERS)
def test_a_factor_of_zero_is_dense_attention(order: str) -> None:
    sizes = Sizes()
    q, k, v = skipping_inputs(sizes, seed=1)
    none = torch.zeros(sizes.heads)
    for mask in masks(sizes, seed=1).values():
        dense = dense_attention(q, k, v, mask, True, 0.5, 0)
        ours = SKIP_SOFTMAX(q, k, v, mask, none, none, True, 0.5, 0, 32, 16, order)
        torch.testing.assert_close(ours, dense, rtol=1e-9, atol=1e-9)


def test_the_sink_first_order_skips_more() -> None:
    """It meets the row's largest scores early."""
    sizes = Sizes(queries=200, keys=200)
    q, k, _ = skipping_inputs(sizes, seed=2)
    s = meaning.scores(q, k, None, True, 0.5, 0)
    factor = torch.full((sizes.heads,), 2.0)
    kept = {o: int(meaning.kept_tiles(s, 2, factor, 32, 16, o).sum()) for o in ORDERS}
    assert kept["sink_diagonal"] < kept["ascending"], kept


def test_random_scores_never_skip() -> None:
    generator = torch.Generator().manual_seed(3)
    s = torch.randn(1, 2, 128, 512, generator=generator)
    keep = meaning.kept_tiles(s, 2, torch.full((2,), 1e-3 * 512), 64, 64, "ascending")
    assert bool(keep.all())


def test_padding_rows_do_not_vote() -> None:
    """33 queries in tiles of 32: the 31 rows behind the last must not keep a tile."""
    sizes = Sizes(batch=1, heads=1, kv_heads=1, queries=33, keys=256)
    q, k, _ = skipping_inputs(sizes, seed=4)
    s = meaning.scores(q, k, None, True, 0.5, 0)
    factor = torch.full((1,), 20.0)
    keep = meaning.kept_tiles(s, 1, factor, 32, 16, "ascending")
    alone = meaning.kept_tiles(s[:, :, 32:], 1, factor, 32, 16, "ascending")
    assert keep.shape[2] == 2 and torch.equal(keep[:, :, 1:], alone)
    assert not bool(alone.all())


@pytest.mark.parametrize("op", sorted(ATTENTION_OPS, key=str))
def test_a_row_that_sees_nothing_is_zero_and_nan_stays_in_its_row(op: object) -> None:
    sizes = Sizes(batch=1, heads=2, kv_heads=1, queries=40, keys=40)
    q, k, v = skipping_inputs(sizes, seed=5)
    mask = torch.ones(40, 40, dtype=torch.bool)
    mask[3] = False
    assert not call(op, q, k, v, mask).isnan().any()
    assert bool((call(op, q, k, v, mask)[:, :, 3] == 0).all())
    q[0, 0, 7] = math.nan
    strange = call(op, q, k, v, None)
    dense = dense_attention(q, k, v, None, True, 0.5, 0)
    assert torch.equal(strange.isnan(), dense.isnan())


def call(op: object, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    heads = q.shape[1]
    factor = torch.full((heads,), 1.0)
    if op is SKIP_SOFTMAX:
        return SKIP_SOFTMAX(q, k, v, mask, factor, factor, True, 0.5, 0, 32, 16, "sink_diagonal")
    if op is BLOCK:
        keep = torch.ones(1, 1, 2, 3, dtype=torch.bool)
        return BLOCK(q, k, v, mask, keep, True, 0.5, 0, 32, 16)
    table = torch.zeros(heads, 1)
    lengths = torch.tensor([40])
    settings = (8, "pre", "exact", True)
    return THETA(q, k, v, mask, lengths, table, None, True, 0.5, 0, *settings)


@pytest.mark.parametrize("op", sorted(ATTENTION_OPS, key=str))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_strides_and_fakes(op: object, dtype: torch.dtype) -> None:
    sizes = Sizes(batch=2, heads=4, kv_heads=2, queries=40, keys=48)
    q, k, v = skipping_inputs(sizes, seed=6, dtype=dtype)
    exact = call(op, q.double(), k.double(), v.double(), None)
    result = call(op, q, k, v, None)
    assert result.dtype == dtype and result.stride() == (40 * 4 * 16, 16, 4 * 16, 1)
    bound = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    assert float((result.double() - exact).abs().max()) < bound
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = call(op, *(mode.from_tensor(each) for each in (q, k, v)), None)
    assert (fake.shape, fake.stride(), fake.dtype) == (result.shape, result.stride(), dtype)


def theta_arguments(sizes: Sizes, limit: float) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([1, sizes.keys // 2, sizes.keys])
    heads = torch.arange(sizes.heads)[:, None]
    return lengths, limit + 0.1 * heads + torch.tensor([0.0, 0.2, 0.4])


@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_the_exact_denominator_is_a_threshold_behind_the_softmax(kind: str) -> None:
    """methods: SDC with R = sum over dropped e^(x-m) gives p of the whole row."""
    sizes = Sizes()
    q, k, v = skipping_inputs(sizes, seed=7)
    mask = masks(sizes, seed=7)[kind]
    lengths, theta = theta_arguments(sizes, 2.0)
    result = meaning.theta_attention(
        q, k, v, mask, lengths, theta, None, True, 0.5, 0, 8, "pre", "exact", False
    )
    s = meaning.scores(q, k, mask, True, 0.5, 0)
    count = (s > NEVER).sum(-1)
    keep = (s > brute_limits(lengths, theta, count)) | (count <= 8)[..., None]
    assert 0.02 < float((keep & (s > NEVER)).sum() / (s > NEVER).sum()) < 0.9
    p = meaning.softmax(s).masked_fill(~keep, 0)
    torch.testing.assert_close(result, p @ v.repeat_interleave(2, 1), rtol=1e-9, atol=1e-9)


def brute_limits(lengths: Tensor, theta: Tensor, count: Tensor) -> Tensor:
    """The threshold of each row, [batch, heads, rows, 1], by numpy's interpolation."""
    import numpy as np

    rows = [
        np.interp(count[:, h].numpy(), lengths.numpy(), theta[h].double().numpy())
        for h in range(theta.shape[0])
    ]
    return torch.from_numpy(np.stack(rows, 1))[..., None]


@pytest.mark.parametrize("denominator", ["exact", "exp_threshold", "offline", "none"])
@pytest.mark.parametrize("placement", ["pre", "post"])
def test_theta_by_its_formulas(denominator: str, placement: str) -> None:
    """p' = e^(x-m) / (D + R), then the lost mass to the mean of V; row by row, in a loop."""
    sizes = Sizes(batch=1, heads=2, kv_heads=1, queries=30, keys=40, dim=4)
    q, k, v = skipping_inputs(sizes, seed=8)
    lengths, theta = theta_arguments(sizes, 2.0 if placement == "pre" else 0.01)
    lost = torch.full((2, 3), 0.7)
    result = meaning.theta_attention(
        q, k, v, None, lengths, theta, lost, True, 0.5, 0, 6, placement, denominator, True
    )
    s = meaning.scores(q, k, None, True, 0.5, 0)
    limits = brute_limits(lengths, theta, (s > NEVER).sum(-1))
    for h, r in itertools.product(range(2), range(30)):
        row = s[0, h, r][s[0, h, r] > NEVER]
        values, limit = v[0, 0, : len(row)], float(limits[0, h, r])
        weight = (row - row.max()).exp()
        p = weight / weight.sum()
        keep = (row if placement == "pre" else p) > limit if len(row) > 6 else row > NEVER
        if placement == "pre":
            gone = int((~keep).sum())
            missing = {
                "exact": float(weight[~keep].sum()),
                "exp_threshold": gone * math.exp(limit - float(row.max())),
                "offline": 0.7 if gone else 0.0,
                "none": 0.0,
            }[denominator]
            total = float(weight[keep].sum()) + missing
            p = weight / total if total else weight * 0
        p = p * keep
        expected = p @ values + (1 - p.sum()) * values.mean(0)
        torch.testing.assert_close(result[0, h, r], expected, rtol=1e-6, atol=1e-6)


def test_the_mean_of_v_restores_the_mass_of_a_row() -> None:
    """With V all ones, the output is the sum of the weights of a row: 1 once V's mean is added."""
    sizes = Sizes(queries=60, keys=60)
    q, k, v = skipping_inputs(sizes, seed=9)
    lengths, theta = theta_arguments(sizes, 17.5)
    ones = torch.ones_like(v)
    run = [
        meaning.theta_attention(
            q, k, ones, None, lengths, theta, None, True, 0.5, 0, 4, "pre", "exact", v_mean
        )
        for v_mean in (False, True)
    ]
    assert float(run[0].min()) < 0.9
    torch.testing.assert_close(run[1], torch.ones_like(run[1]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window", [0, 20])
def test_block_attention_sees_the_listed_tiles_only(window: int) -> None:
    sizes = Sizes()
    q, k, v = skipping_inputs(sizes, seed=10)
    generator = torch.Generator().manual_seed(10)
    keep = torch.rand(2, 4, 4, 9, generator=generator) < 0.5
    result = BLOCK(q, k, v, None, keep, True, 0.5, window, 32, 16)
    elements = keep.repeat_interleave(32, 2)[:, :, :100].repeat_interleave(16, 3)[..., :130]
    place, key = torch.arange(30, 130)[:, None], torch.arange(130)
    seen = (key <= place) & ((key > place - window) if window else True)
    expected = dense_attention(q, k, v, elements & seen, False, 0.5, 0)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)
