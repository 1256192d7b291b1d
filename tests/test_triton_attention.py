"""The Triton attention kernels with many queries compute what the dialect says, interpreted."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsefx.attention import meaning
from sparsefx.attention.dense import is_visible
from sparsefx.codegen.triton.attention import launch, prefill, tiles
from tests.attention_cases import Sizes
from tests.triton_attention_cases import DEFERRED, DIRECT, Case

SMALL = Sizes(batch=1, heads=2, kv_heads=1, queries=40, keys=40, dim=16)
LONG = replace(SMALL, queries=21, keys=70, dim=24)  # a chunk of a prefill; ragged everywhere
WIDE = Sizes(batch=2, heads=2, kv_heads=2, queries=20, keys=33, dim=80)
TALL = replace(SMALL, queries=40, keys=25)  # the first rows see no key
HALF, BRAIN = torch.float16, torch.bfloat16
CASES = [
    Case(SMALL),
    Case(SMALL, order="ascending"),
    Case(LONG, tile=(32, 16)),
    Case(LONG, tile=(16, 32), order="ascending", window=30),
    Case(LONG, is_causal=False, mask="bool", factor=16),
    Case(LONG, window=20, mask="float", order="ascending"),
    Case(LONG, is_causal=False, window=18),
    Case(WIDE, mask="float"),
    Case(WIDE, tile=(16, 32), mask="bool", order="ascending", window=9),
    Case(WIDE, is_causal=False, dtype=HALF),
    Case(TALL, window=12),
    Case(TALL, order="ascending", mask="bool"),
    Case(SMALL, dtype=HALF, tile=(32, 32)),
    Case(SMALL, dtype=BRAIN, mask="float"),
    Case(replace(LONG, dim=256), dtype=BRAIN, order="ascending"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache folder of its own for each test, and no kernel left loaded from another one."""
    monkeypatch.setenv("SPARSEFX_CACHE", str(tmp_path))
    launch.load.cache_clear()
    yield
    launch.load.cache_clear()


@pytest.mark.parametrize("index", range(len(CASES)))
def test_skip_softmax_is_the_meaning_tile_by_tile(index: int) -> None:
    """Both forms take turns over the cases and meet every order, mask and window."""
    CASES[index].check_skip(*CASES[index].operands(), DEFERRED if index % 2 else DIRECT)


@pytest.mark.parametrize("form", [DIRECT, DEFERRED], ids=["direct", "deferred"])
@pytest.mark.parametrize("order", ["ascending", "sink_diagonal"])
def test_tiles_are_skipped(order: str, form: prefill.Form) -> None:
    """The inputs make both orders skip, so that the other tests compare something."""
    case = Case(replace(SMALL, queries=16, keys=112), order=order, factor=30)
    counts = case.check_skip(*case.operands(), form)
    assert counts.sum() < 2 * 7


@pytest.mark.parametrize("seed", range(4))
def test_random_sizes(seed: int) -> None:
    """Sizes, tile, window, order and mask drawn at random from a fixed seed."""
    draw = torch.Generator().manual_seed(100 + seed)

    def pick(*choices: int) -> int:
        return choices[int(torch.randint(len(choices), (1,), generator=draw))]

    queries = pick(2, 15, 17, 33)
    keys = queries + pick(0, 1, 16, 31)
    kv_heads, dim = pick(1, 2), pick(8, 17, 32)
    case = Case(
        Sizes(1, kv_heads * pick(1, 2), kv_heads, queries, keys, dim),
        tile=(pick(16, 32), pick(16, 32)),
        order=("ascending", "sink_diagonal")[pick(0, 1)],
        window=pick(0, 0, 1, 19),
        mask=("none", "bool", "float")[pick(0, 1, 2)],
        factor=float(pick(1, 10, 30)),
        seed=seed,
    )
    q, k, v, mask = case.operands()
    keep = case.kept(q, k, mask)
    case.check_skip(q, k, v, mask, DEFERRED)
    case.check(case.block(q, k, v, mask, keep), q, k, v, mask, keep)


def test_a_factor_of_zero_skips_nothing_visible() -> None:
    case = Case(LONG, factor=0.0)
    q, k, v, _ = case.operands()
    visible = is_visible(21, 70, True, 0, q.device)
    assert visible is not None
    rows = torch.nn.functional.pad(visible, (0, 10, 0, 11)).view(2, 16, 5, 16)
    counts = case.check_skip(q, k, v, None, DEFERRED)
    assert torch.equal(counts[0, 0], rows.any(3).any(1).sum(-1).int())


@pytest.mark.parametrize("order", ["ascending", "sink_diagonal"])
def test_nan_keeps_its_tiles_and_reaches_its_rows_only(order: str) -> None:
    case = Case(SMALL, order=order, factor=30)
    q, k, v, _ = case.operands()
    k[0, 0, 18, 3] = torch.nan
    result, _ = case.skip(q, k, v, None, DEFERRED)
    case.check_skip(q, k, v, None, DIRECT)
    assert result[0, :, 18:].isnan().all() and not result[0, :, :18].isnan().any()


def test_rows_that_see_nothing_are_zero() -> None:
    case = Case(SMALL, mask="bool")
    q, k, v, _ = case.operands()
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool)
    mask[..., 3:20, :] = False
    result, _ = case.skip(q, k, v, mask, DEFERRED)
    case.check_skip(q, k, v, mask, DIRECT)
    assert not result[:, :, 3:20].any() and result[:, :, 20:].any()


def test_a_row_masked_by_the_least_float_is_a_mean() -> None:
    """Models write left padding so; scaled to base 2 the mask would overflow to -inf."""
    case = Case(SMALL, mask="float", is_causal=False)
    q, k, v, _ = case.operands()
    mask = torch.zeros(1, 1, 40, 40)
    mask[..., :5, :] = torch.finfo(torch.float32).min
    result, _ = case.skip(q, k, v, mask, DEFERRED)
    torch.testing.assert_close(result[0, 0, :5], v[0].mean(-2).expand(5, -1), rtol=0, atol=1e-5)
    torch.testing.assert_close(result[0, 1, :5], v[0].mean(-2).expand(5, -1), rtol=0, atol=1e-5)


def test_layouts_of_models_are_read_where_they_lie() -> None:
    """[batch, length, heads, dim] transposed, and a mask that is broadcast by strides of 0."""
    case = Case(SMALL, mask="bool")
    q, k, v, _ = case.operands()
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    mask = (torch.arange(40) > 4).expand(1, 2, 40, 40)
    assert all(launch.rows_contiguous(x) is x for x in turned)
    case.check_skip(*turned, mask, DEFERRED)
    column_major = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    case.check_skip(*column_major, mask[0, 0], DIRECT)


def test_a_negative_scale() -> None:
    case = Case(SMALL)
    q, k, v, _ = case.operands()
    handle = "skip_prefill float32 dim 16 group 2 tile 16x16 mask none causal order=sink_diagonal"
    arguments = (None, case.factors(), -case.scale, 0, DEFERRED)
    result, _ = prefill.computed_tiles(handle, q, k, v, *arguments)
    assert torch.equal(result, case.skip(-q, k, v, None, DEFERRED)[0])


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (3, 0)])
def test_nothing_to_see(queries: int, keys: int) -> None:
    q, kv = torch.randn(1, 2, queries, 16), torch.randn(1, 1, keys, 16)
    handle = "skip_prefill float32 dim 16 group 2 tile 16x16 mask none order=ascending"
    result = prefill.skip_softmax(handle, q, kv, kv, None, torch.ones(2), 1.0, 0)
    assert result.shape == q.shape and not result.any()


@pytest.mark.parametrize("index", range(0, len(CASES), 2))
def test_block_attention_is_the_meaning(index: int) -> None:
    """Random maps, shared by batch entries and heads in turn."""
    case = CASES[index]
    q, k, v, mask = case.operands()
    rows, columns = (-(-n // t) for n, t in zip((q.shape[2], k.shape[2]), case.tile, strict=True))
    leading = [(*q.shape[:2],), (1, q.shape[1]), (q.shape[0], 1), (1, 1)][index // 2 % 4]
    draw = torch.Generator().manual_seed(index)
    keep = torch.rand(*leading, rows, columns, generator=draw) < 0.6
    case.check(case.block(q, k, v, mask, keep), q, k, v, mask, keep)


@pytest.mark.parametrize(("is_causal", "window"), [(True, 0), (True, 20), (False, 18), (False, 0)])
def test_lists_of_tiles(is_causal: bool, window: int) -> None:
    """Whole tiles first, then those that need masking, each ascending; invisible ones nowhere."""
    queries, keys, block_q, block_k = 50, 77, 32, 16
    keep = torch.rand(2, 3, 2, 5, generator=torch.Generator().manual_seed(1)) < 0.7
    listed, counts = tiles.lists(keep, queries, keys, is_causal, window, block_q, block_k)
    seen = is_visible(queries, keys, is_causal, window, keep.device)
    visible = torch.ones(queries, keys, dtype=torch.bool) if seen is None else seen
    for at in torch.cartesian_prod(*(torch.arange(n) for n in keep.shape[:3])).tolist():
        b, h, r = at
        parts = [
            visible[r * block_q : (r + 1) * block_q, c * block_k : (c + 1) * block_k]
            for c in range(5)
        ]
        kept = [c for c in range(5) if keep[b, h, r, c] and parts[c].any()]
        whole = [c for c in kept if parts[c].all() and parts[c].shape[1] == block_k]
        edge = [c for c in kept if c not in whole]
        assert counts[b, h, r].tolist() == [len(whole), len(kept)]
        assert listed[b, h, r, : len(kept)].tolist() == whole + edge


def test_the_meaning_agrees_with_itself() -> None:
    """The oracle of these tests: block attention over the kept tiles is skip-softmax attention."""
    case = CASES[3]
    q, k, v, mask = (None if x is None else x.double() for x in case.operands())
    assert q is not None and k is not None and v is not None
    seen = (case.is_causal, case.scale, case.window, *case.tile)
    whole = meaning.skip_softmax_attention(
        q, k, v, mask, case.factors(), case.factors(), *seen, case.order
    )
    listed = meaning.block_attention(q, k, v, mask, case.kept(q, k, mask), *seen)
    assert torch.equal(whole, listed)
