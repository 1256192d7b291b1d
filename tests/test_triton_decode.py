"""Skip-softmax decode: the Triton kernels compute what it means, for any split of the keys."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsefx.attention import meaning
from sparsefx.attention.operators import SKIP_SOFTMAX, attention_output
from sparsefx.codegen.triton import library
from sparsefx.codegen.triton.attention import decode_launch, decode_skip, launch
from sparsefx.codegen.triton.attention.decode_kernels import DECODE_KERNELS, TritonSkipDecode
from sparsefx.errors import InvalidHandle, ShapeMismatch
from sparsefx.target import AttentionLowering, AttentionSpec
from tests.attention_cases import Sizes, masks, skipping_inputs
from tests.interp_bf16 import repaired

SEED = 3
ORDERS = ("sink_diagonal", "ascending")
SIZES = Sizes(batch=1, heads=4, kv_heads=2, queries=1, keys=205, dim=16)
GROUPS = (1, 3, 17)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache folder of its own for each test, and no kernel left loaded from another one."""
    monkeypatch.setenv("SPARSEFX_CACHE", str(tmp_path))
    launch.load.cache_clear()
    yield
    launch.load.cache_clear()


def decode_spec(
    sizes: Sizes,
    dtype: torch.dtype = torch.float32,
    block_k: int = 16,
    order: str = "sink_diagonal",
    mask: str = "none",
    window: int = 0,
) -> AttentionSpec:
    return AttentionSpec(
        method="skip_softmax",
        phase="decode",
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.dim,
        dtype=dtype,
        mask=mask,
        is_causal=False,
        window=window,
        tile=(64, block_k),
        order=order,
        options=(),
        batch=sizes.batch,
        queries=1,
        keys=sizes.keys,
        vary=True,
        sparsity=0.5,
    )


def lowered(spec: AttentionSpec) -> AttentionLowering:
    kernel = TritonSkipDecode()
    assert kernel.accepts(spec) is None
    return kernel.lower(spec)


def factors(heads: int, keys: int) -> Tensor:
    """Thresholds that differ from head to head, of which the first keeps most tiles."""
    return keys * torch.linspace(-8.0, -1.0, heads).exp()


class Call:
    """One call of the kernels, and what the operator means by it."""

    def __init__(self, spec: AttentionSpec, operands: tuple[Tensor, ...], mask: Tensor | None):
        self.spec, self.mask = spec, mask
        self.q, self.k, self.v = operands
        self.factor = factors(spec.heads, self.k.shape[2])
        self.scale = spec.head_dim**-0.5

    def run(self) -> tuple[Tensor, Tensor]:
        handle, factor = lowered(self.spec).handle, self.factor
        operands = (self.q, self.k, self.v, self.mask)
        return decode_skip.run_counted(handle, *operands, factor, self.scale, self.spec.window)

    def expected(self) -> Tensor:
        wide = [each.double() for each in (self.q, self.k, self.v)]
        seen = (False, self.scale, self.spec.window)
        method = (self.factor, self.factor)
        tile = (*self.spec.tile, self.spec.order)
        return SKIP_SOFTMAX(*wide, self.mask, *method, *seen, *tile)

    def kept(self) -> Tensor:
        """How many tiles of each KV head the rule keeps: [batch, kv_heads]."""
        q, k = self.q.double(), self.k.double()
        s = meaning.scores(q, k, self.mask, False, self.scale, self.spec.window)
        kv_heads = self.spec.kv_heads
        keep = meaning.kept_tiles(s, kv_heads, self.factor, *self.spec.tile, self.spec.order)
        return keep[:, :: self.spec.heads // kv_heads, 0].sum(-1)

    def check(self) -> int:
        """Asserts result and counts; returns how many tiles were kept."""
        result, counts = self.run()
        expected, kept = self.expected(), self.kept()
        assert counts.dtype == torch.int32 and torch.equal(counts.long(), kept)
        fake = attention_output(self.q, self.k, self.v)
        assert result.dtype == fake.dtype and result.stride() == fake.stride()
        error = (result.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-9)
        # float32 sums; p, V and the result rounded to the dtype
        assert error < 2 * torch.finfo(result.dtype).eps + 1e-6, f"seed {SEED}: {error:.2e}"
        return int(kept.sum())


def call(sizes: Sizes, spec: AttentionSpec, mask: str = "none", seed: int = SEED) -> Call:
    inputs = skipping_inputs(sizes, seed, spec.dtype)
    return Call(spec, inputs, masks(sizes, seed)[mask])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("block_k", [16, 32, 64, 128])
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_equals_the_meaning(mask: str, block_k: int, order: str) -> None:
    sizes = replace(SIZES, batch=2 if mask == "bool" else 1)
    spec = decode_spec(sizes, block_k=block_k, order=order, mask=mask)
    kept = call(sizes, spec, mask).check()
    tiles = sizes.batch * sizes.kv_heads * -(-sizes.keys // block_k)
    assert 0 < kept < tiles or (block_k == 128 and kept <= tiles)  # something was skipped


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("processors", [1, 3, 1000])
def test_the_number_of_splits_changes_nothing(
    processors: int, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One program of a pair or many: the running maxima are the row's, so the same tiles stay."""
    monkeypatch.setattr(decode_launch, "LEAST", 1)
    monkeypatch.setattr(decode_launch, "PROGRAMS", 4)
    monkeypatch.setattr(decode_launch, "_processors", lambda device: processors)
    sizes = replace(SIZES, keys=350)
    one = call(sizes, decode_spec(sizes, order=order))
    splits = decode_launch.Problem.of(
        launch.load(lowered(one.spec).handle).variant, one.q, one.k, 16, 0
    )
    assert splits.cut()[1] == {1: 2, 3: 6, 1000: 11}[processors]
    one.check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_k", [16, 64])
def test_half_precision(dtype: torch.dtype, block_k: int) -> None:
    with repaired():
        call(SIZES, decode_spec(SIZES, dtype, block_k)).check()


@pytest.mark.parametrize("group", GROUPS)
def test_heads_that_share_a_kv_head_decide_together(group: int) -> None:
    sizes = replace(SIZES, heads=2 * group, keys=100)
    call(sizes, decode_spec(sizes)).check()


@pytest.mark.parametrize("dim", [1, 40, 80, 256])
def test_head_sizes(dim: int) -> None:
    sizes = replace(SIZES, dim=max(dim, 3), keys=90)
    one = call(sizes, decode_spec(sizes))
    if dim == 1:
        one.q, one.k, one.v = one.q[..., 2:3], one.k[..., 2:3], one.v[..., :1]
        one.spec = replace(one.spec, head_dim=1)
    one.check()


@pytest.mark.parametrize("keys", [1, 15, 16, 17, 64, 65, 128])
def test_lengths_around_a_tile(keys: int) -> None:
    sizes = replace(SIZES, keys=keys)
    call(sizes, decode_spec(sizes)).check()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("window", [1, 30, 100, 5000])
def test_sliding_window(window: int, order: str) -> None:
    """The sink leaves the window, so tile 0 of the row may not be the first that is read."""
    spec = decode_spec(SIZES, window=window, order=order)
    call(SIZES, spec).check()
    call(SIZES, replace(spec, mask="bool"), "bool").check()


def test_a_cache_with_room_is_read_in_place() -> None:
    """K and V as slices of a longer [batch, keys, heads, dim] cache, without a copy."""
    one = call(SIZES, decode_spec(SIZES))
    for name in ("k", "v"):
        data = getattr(one, name)
        room = torch.full((SIZES.batch, 300, SIZES.kv_heads, 24), math.nan)
        room[:, : SIZES.keys, :, : SIZES.dim] = data.transpose(1, 2)
        setattr(one, name, room.transpose(1, 2)[:, :, : SIZES.keys, : SIZES.dim])
    assert launch.rows_contiguous(one.k) is one.k
    one.check()


def test_a_static_cache_hides_what_is_not_written() -> None:
    """All of a fixed cache is passed, the mask says which part; what is hidden may be NaN."""
    one = call(SIZES, decode_spec(SIZES, mask="bool"))
    one.mask = (torch.arange(SIZES.keys) < 120).expand(SIZES.batch, 1, 1, SIZES.keys)
    clean = one.run()
    one.k = one.k.clone()
    one.k[:, :, 120:] = math.nan
    assert torch.equal(one.run()[0], clean[0]) and torch.equal(one.run()[1], clean[1])
    one.k[:, :, 120:] = 0
    one.check()


def test_one_kernel_serves_all_lengths() -> None:
    long = call(replace(SIZES, keys=600), decode_spec(SIZES))
    short = call(replace(SIZES, batch=3, keys=20), decode_spec(SIZES))
    assert lowered(long.spec).handle == lowered(short.spec).handle
    long.check()
    short.check()


@pytest.mark.parametrize("mask", ["bool", "float"])
def test_a_row_that_sees_nothing_is_zero(mask: str) -> None:
    sizes = replace(SIZES, batch=2, keys=70)
    one = call(sizes, decode_spec(sizes, mask=mask), mask)
    assert one.mask is not None
    hidden = one.mask.expand(2, -1, -1, -1).clone()
    hidden[0] = False if mask == "bool" else -math.inf
    one.mask = hidden
    one.check()
    result, counts = one.run()
    assert not result[0].any() and not counts[0].any() and result[1].any()


def test_the_least_float_is_a_mask_like_any_other() -> None:
    """A row of nothing but the least float is a uniform softmax, as in torch's attention."""
    one = call(SIZES, decode_spec(SIZES, mask="float"))
    one.mask = torch.full((SIZES.batch, 1, 1, SIZES.keys), torch.finfo(torch.float32).min)
    one.check()


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("order", ORDERS)
def test_what_is_not_a_number_stays(order: str, value: float) -> None:
    """In its row alone; from there on every tile of the group is kept."""
    one = call(SIZES, decode_spec(SIZES, order=order, mask="float"))
    one.mask = torch.zeros(1, SIZES.heads, 1, SIZES.keys)
    one.mask[0, 1, 0, 100] = value
    result, counts = one.run()
    expected = one.expected()
    assert torch.equal(result.isnan(), expected.isnan())
    assert result[:, 1].isnan().all() and not result[:, 2:].isnan().any()
    assert torch.equal(counts.long(), one.kept())
    torch.testing.assert_close(result[:, 2:], expected[:, 2:].float())
    torch.testing.assert_close(result[:, 0], expected[:, 0].float())


@pytest.mark.parametrize("factor", [0.0, 1e-6, 1e9])
def test_extreme_factors(factor: float) -> None:
    one = call(SIZES, decode_spec(SIZES))
    one.factor = torch.full((SIZES.heads,), factor)
    kept = one.check()
    tiles = -(-SIZES.keys // 16) * SIZES.batch * SIZES.kv_heads
    assert kept == tiles if factor < 1 else kept < tiles / 4


def test_no_keys_and_no_batch() -> None:
    nothing = replace(SIZES, keys=1)
    one = call(nothing, decode_spec(nothing))
    one.k, one.v = one.k[:, :, :0], one.v[:, :, :0]
    result, counts = one.run()
    assert not result.any() and not counts.any()
    one.q, one.k, one.v = one.q[:0], one.k[:0], one.v[:0]
    assert one.run()[0].shape == (0, SIZES.heads, 1, SIZES.dim)


def through_operator(one: Call, dense_below: int = 0, calibrated: int = 0) -> Tensor:
    lowering = lowered(one.spec)
    method = (one.factor * math.nan, one.factor)  # a single query reads the second alone
    seen = (False, one.scale, one.spec.window, *one.spec.tile, one.spec.order)
    route = (dense_below, calibrated, lowering.handle)
    return lowering.op(one.q, one.k, one.v, one.mask, *method, *seen, *route)


def test_operator_launches_the_kernels() -> None:
    one = call(SIZES, decode_spec(SIZES))
    assert torch.equal(through_operator(one), one.run()[0])


def test_operator_goes_dense_when_short() -> None:
    one = call(SIZES, decode_spec(SIZES))
    dense = torch.nn.functional.scaled_dot_product_attention(one.q, one.k, one.v, enable_gqa=True)
    torch.testing.assert_close(through_operator(one, dense_below=SIZES.keys + 1), dense)
    assert (through_operator(one, dense_below=SIZES.keys) - dense).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plain_meaning_where_nothing_can_launch(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "interpreting", lambda: False)
    one = call(SIZES, decode_spec(SIZES, dtype))
    expected = one.expected()
    error = (through_operator(one).double() - expected).abs().max() / expected.abs().max()
    assert error < torch.finfo(dtype).eps + 1e-6


def test_operator_is_registered_rightly() -> None:
    one = call(SIZES, decode_spec(SIZES))
    lowering = lowered(one.spec)
    seen = (False, one.scale, 0, *one.spec.tile, one.spec.order)
    arguments = (one.q, one.k, one.v, None, one.factor, one.factor, *seen, 0, 0, lowering.handle)
    torch.library.opcheck(lowering.op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"order": "ascending"}, InvalidHandle),
        ({"tile": (64, 32)}, InvalidHandle),
        ({"window": 9}, InvalidHandle),
    ],
)
def test_a_call_of_another_kernel_is_refused(
    change: dict[str, object], error: type[Exception]
) -> None:
    one = call(SIZES, decode_spec(SIZES))
    lowering = lowered(one.spec)
    spec = replace(one.spec, **change)
    seen = (False, one.scale, spec.window, *spec.tile, spec.order)
    with pytest.raises(error):
        lowering.op(one.q, one.k, one.v, None, one.factor, one.factor, *seen, 0, 0, lowering.handle)


def test_other_shapes_are_refused() -> None:
    one = call(SIZES, decode_spec(SIZES))
    one.factor = one.factor[:3]
    with pytest.raises(ShapeMismatch, match="factor has shape"):
        through_operator(one)
    one = call(SIZES, decode_spec(SIZES))
    one.q = one.q.expand(-1, -1, 2, -1)
    with pytest.raises(ShapeMismatch, match="one query"):
        through_operator(one)


def test_a_factor_is_read_as_it_is_laid_out() -> None:
    """One for all heads, expanded; every other one of more; in another dtype."""
    one = call(SIZES, decode_spec(SIZES))
    shared = torch.tensor([0.07, 1e9, 1e9, 1e9])[:1].expand(4)
    strided = torch.stack((one.factor, torch.zeros(4)), 1)[:, 0]
    kept = []
    for factor in (shared, strided, one.factor.double()):
        assert not factor.is_contiguous() or factor.dtype == torch.float64
        one.factor = factor
        kept.append(one.check())
    assert kept == [22, 12, 12]  # of the neighbours: 12 and 26


SPEC = decode_spec(SIZES)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (replace(SPEC, phase="prefill"), "not skip_softmax prefill"),
        (replace(SPEC, method="block"), "not block decode"),
        (replace(SPEC, dtype=torch.float64), "not torch.float64"),
        (replace(SPEC, head_dim=257), "257"),
        (replace(SPEC, heads=130, kv_heads=2), "more than 64 query heads"),
        (replace(SPEC, tile=(64, 48)), "(64, 48)"),
        (replace(SPEC, order="random"), "'random'"),
    ],
)
def test_declines_with_a_reason(spec: AttentionSpec, reason: str) -> None:
    answer = TritonSkipDecode().accepts(spec)
    assert answer is not None and reason in answer


def test_names() -> None:
    assert [kernel.name for kernel in DECODE_KERNELS] == [
        "triton_skip_decode",
        "triton_theta_decode",
    ]


def test_the_generated_text_is_all_that_the_kernels_are() -> None:
    lowering = lowered(SPEC)
    assert "from sparsefx" not in lowering.text
    assert lowering.text.startswith(f"# generated by sparsefx from: {lowering.handle}")
    assert Path(lowering.path).read_text() == lowering.text
