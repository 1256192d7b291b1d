"""Top-Theta decode: the Triton kernels compute what it means and read only the kept rows of V."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsefx.attention import meaning
from sparsefx.attention.operators import THETA, attention_output
from sparsefx.codegen.triton import library
from sparsefx.codegen.triton.attention import decode_launch, launch, theta_decode
from sparsefx.codegen.triton.attention.decode_kernels import TritonThetaDecode
from sparsefx.errors import DtypeMismatch, InvalidHandle, ShapeMismatch
from sparsefx.target import AttentionSpec
from tests.attention_cases import Sizes, masks, skipping_inputs
from tests.interp_bf16 import repaired

SEED = 5
SIZES = Sizes(batch=1, heads=4, kv_heads=2, queries=1, keys=120, dim=16)
FORMS = [
    ("pre", "exact"),
    ("pre", "exp_threshold"),
    ("pre", "offline"),
    ("pre", "none"),
    ("post", "none"),
]
TOPK = 12


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache folder of its own for each test, and no kernel left loaded from another one."""
    monkeypatch.setenv("SPARSEFX_CACHE", str(tmp_path))
    launch.load.cache_clear()
    yield
    launch.load.cache_clear()


@dataclass
class Case:
    """One call of the kernels, and what the operator means by it."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    lengths: Tensor
    theta: Tensor
    lost: Tensor | None
    spec: AttentionSpec

    @property
    def scale(self) -> float:
        return self.spec.head_dim**-0.5

    @property
    def how(self) -> tuple[int, str, str, bool]:
        topk, placement, denominator, v_mean = self.spec.options
        return int(topk), placement, denominator, v_mean == "True"

    @property
    def handle(self) -> str:
        kernel = TritonThetaDecode()
        assert kernel.accepts(self.spec) is None
        return kernel.lower(self.spec).handle

    @property
    def tables(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.lengths, self.theta, self.lost

    def run(self, v_mean: Tensor | None = None) -> tuple[Tensor, Tensor]:
        arguments = (self.q, self.k, self.v, self.mask, self.tables, self.scale, self.spec.window)
        return theta_decode.run_counted(self.handle, *arguments, self.how[0], v_mean)

    def operator(self) -> Tensor:
        lowering = TritonThetaDecode().lower(self.spec)
        seen = (False, self.scale, self.spec.window)
        operands = (self.q, self.k, self.v, self.mask, *self.tables)
        return lowering.op(*operands, *seen, *self.how, 0, 0, lowering.handle)

    def expected(self, keep_all: bool = False) -> Tensor:
        wide = [each.double() for each in (self.q, self.k, self.v)]
        topk, *rest = self.how
        seen = (False, self.scale, self.spec.window)
        return THETA(*wide, self.mask, *self.tables, *seen, 10**6 if keep_all else topk, *rest)

    def scores(self) -> Tensor:
        q, k = self.q.double(), self.k.double()
        return meaning.scores(q, k, self.mask, False, self.scale, self.spec.window)

    def mean(self) -> Tensor:
        """The mean of V over the keys that each row sees: [batch, heads, dim]."""
        visible = self.scores() != -math.inf
        values = meaning.spread(self.v.double(), self.spec.heads)
        count = visible.sum(-1, keepdim=True).clamp(min=1)
        return (visible.double() @ values / count)[:, :, 0].float()

    def rows_read(self) -> Tensor:
        """How many keys some head of a group keeps, for placement "pre" and one length."""
        s, group = self.scores(), self.spec.heads // self.spec.kv_heads
        visible = s != -math.inf
        few = visible.sum(-1, keepdim=True) <= self.how[0]
        keep = visible & ((s > self.theta[:, :1, None]) | few)
        return keep[:, :, 0].unflatten(1, (-1, group)).any(2).sum(-1)

    def check(self, v_mean: Tensor | None = None) -> None:
        result, _ = self.run(v_mean)
        expected, fake = self.expected(), attention_output(self.q, self.k, self.v)
        assert result.dtype == fake.dtype and result.stride() == fake.stride()
        error = (result.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-9)
        assert error < 2 * torch.finfo(result.dtype).eps + 2e-6, f"seed {SEED}: {error:.2e}"


def case(
    sizes: Sizes = SIZES,
    form: tuple[str, str] = ("pre", "exact"),
    v_mean: bool = False,
    mask: str = "none",
    window: int = 0,
    dtype: torch.dtype = torch.float32,
    points: int = 3,
) -> Case:
    """Thresholds that each head's upper fifth passes, or less, known at `points` lengths."""
    placement, denominator = form
    spec = AttentionSpec(
        method="theta",
        phase="decode",
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.dim,
        dtype=dtype,
        mask=mask,
        is_causal=False,
        window=window,
        tile=(0, 0),
        order="",
        options=(str(TOPK), placement, denominator, str(v_mean)),
        batch=sizes.batch,
        queries=1,
        keys=sizes.keys,
        vary=True,
        sparsity=0.5,
    )
    generator = torch.Generator().manual_seed(SEED)
    q, k, v = skipping_inputs(sizes, SEED, dtype, strength=2.0)
    lengths = torch.tensor([sizes.keys // 3, sizes.keys - 9, 2 * sizes.keys][:points])
    random = torch.rand(sizes.heads, points, generator=generator)
    one = Case(q, k, v, masks(sizes, SEED)[mask], lengths, random, None, spec)
    if placement == "pre":
        seen = one.scores().nan_to_num(neginf=-99.0).transpose(0, 1).flatten(1)
        some = [
            row.quantile(0.8 + 0.15 * share)
            for row, share in zip(seen, random.double(), strict=True)
        ]
        one.theta = torch.stack(some).float()
    else:
        one.theta = random * 2 / sizes.keys
    one.lost = 5 * random if denominator == "offline" else None
    return one


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
@pytest.mark.parametrize("v_mean", [False, True])
@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_equals_the_meaning(form: tuple[str, str], v_mean: bool, mask: str) -> None:
    one = case(form=form, v_mean=v_mean, mask=mask)
    one.check()
    if not v_mean:  # the thresholds did something
        assert (one.expected() - one.expected(keep_all=True)).abs().max() > 1e-3


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_a_given_mean_saves_reading_v(form: tuple[str, str]) -> None:
    one = case(form=form, v_mean=True, mask="bool", window=70)
    given = one.mean()
    one.check(given)
    assert torch.equal(one.run()[1], torch.full((1, 2), SIZES.keys, dtype=torch.int32))
    assert (one.run(given)[1] < SIZES.keys).all()
    torch.testing.assert_close(one.run(given)[0], one.run()[0])


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_rows_of_v_that_are_read(mask: str) -> None:
    """Those that a head of the group keeps, and no other: the rest may hold anything."""
    one = case(mask=mask, points=1)
    result, counts = one.run()
    assert counts.dtype == torch.int32 and torch.equal(counts.long(), one.rows_read())
    assert 0 < counts.sum() < SIZES.keys * SIZES.kv_heads / 2
    s = one.scores()[:, :, 0].unflatten(1, (2, 2))
    above = (s > one.theta[:, 0].view(2, 2, 1)).any(2)
    one.v = one.v.masked_fill(~above[..., None], math.nan)
    assert torch.equal(one.run()[0], result)


@pytest.mark.parametrize("form", [("pre", "exp_threshold"), ("post", "none")], ids="-".join)
@pytest.mark.parametrize("processors", [1, 1000])
def test_the_number_of_splits_changes_nothing(
    processors: int, form: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_launch, "LEAST", 1)
    monkeypatch.setattr(decode_launch, "_processors", lambda device: processors)
    monkeypatch.setattr(decode_launch, "PROGRAMS", 4)
    sizes = replace(SIZES, keys=250)
    one = case(sizes, form)
    problem = decode_launch.Problem.of(launch.load(one.handle).variant, one.q, one.k, 1, 0)
    assert problem.cut()[1] == {1: 2, 1000: 8}[processors]
    one.check()
    case(sizes, form, v_mean=True).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("v_mean", [False, True])
def test_half_precision(dtype: torch.dtype, v_mean: bool) -> None:
    with repaired():
        case(dtype=dtype, v_mean=v_mean).check()


@pytest.mark.parametrize("group", [1, 3, 17])
@pytest.mark.parametrize("dim", [8, 40])
def test_groups_and_head_sizes(group: int, dim: int) -> None:
    case(replace(SIZES, heads=2 * group, dim=dim, keys=50)).check()


@pytest.mark.parametrize("window", [1, 40, 500])
@pytest.mark.parametrize("v_mean", [False, True])
def test_sliding_window(window: int, v_mean: bool) -> None:
    case(window=window, v_mean=v_mean, mask="bool").check()


@pytest.mark.parametrize("keys", [1, TOPK, TOPK + 1, 32, 33])
def test_short_rows_stay_dense(keys: int) -> None:
    one = case(replace(SIZES, keys=keys))
    one.check()
    if keys <= TOPK:
        dense = torch.nn.functional.scaled_dot_product_attention(
            one.q, one.k, one.v, enable_gqa=True
        )
        torch.testing.assert_close(one.run()[0], dense)


@pytest.mark.parametrize("points", [1, 2, 3])
def test_thresholds_are_interpolated(points: int) -> None:
    """Below, between and beyond the lengths that are known."""
    for keys in (40, 100, 160):
        one = case(replace(SIZES, keys=keys), points=points)
        one.lengths = torch.tensor([50, 91, 130][:points])
        one.check()


@pytest.mark.parametrize("v_mean", [False, True])
@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_a_row_that_sees_nothing_is_zero(form: tuple[str, str], v_mean: bool) -> None:
    one = case(replace(SIZES, batch=2, keys=60), form, v_mean, mask="bool")
    assert one.mask is not None
    one.mask = one.mask.clone()
    one.mask[0] = False
    one.check()
    assert not one.run()[0][0].any() and one.run()[0][1].any()


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("form", [("pre", "exact"), ("post", "none")], ids="-".join)
def test_what_is_not_a_number_stays_in_its_row(form: tuple[str, str]) -> None:
    one = case(form=form, mask="float")
    assert one.mask is not None
    one.mask = one.mask.clone()
    one.mask[0, 1, 0, 70] = math.nan
    result, expected = one.run()[0], one.expected()
    assert torch.equal(result.isnan(), expected.isnan()) and result[:, 1].isnan().all()
    torch.testing.assert_close(result[:, 2:], expected[:, 2:].float())


def test_offline_without_a_table_means_none() -> None:
    one = case(form=("pre", "offline"))
    one.lost = None
    one.check()


def test_a_cache_with_room_is_read_in_place() -> None:
    one = case()
    for name in ("k", "v"):
        room = torch.full((1, 200, 2, 24), math.nan)
        room[:, : SIZES.keys, :, : SIZES.dim] = getattr(one, name).transpose(1, 2)
        setattr(one, name, room.transpose(1, 2)[:, :, : SIZES.keys, : SIZES.dim])
    one.check()


def test_no_keys() -> None:
    one = case()
    one.k, one.v = one.k[:, :, :0], one.v[:, :, :0]
    assert not one.run()[0].any()


@pytest.mark.parametrize("form", FORMS, ids="-".join)
def test_operator(form: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    one = case(form=form, v_mean=True)
    launched = one.operator()
    assert torch.equal(launched, one.run()[0])
    monkeypatch.setattr(library, "interpreting", lambda: False)
    torch.testing.assert_close(one.operator(), launched)


def test_operator_is_registered_rightly() -> None:
    one = case()
    lowering = TritonThetaDecode().lower(one.spec)
    seen = (False, one.scale, 0)
    operands = (one.q, one.k, one.v, None, *one.tables)
    arguments = (*operands, *seen, *one.how, 0, 0, lowering.handle)
    torch.library.opcheck(lowering.op, arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_call_of_another_kernel_is_refused() -> None:
    one = case()
    lowering = TritonThetaDecode().lower(one.spec)
    operands = (one.q, one.k, one.v, None, *one.tables, False, one.scale, 0)
    for how in ((1, "post", "exact", False), (1, "pre", "exact", True)):
        with pytest.raises(InvalidHandle):
            lowering.op(*operands, *how, 0, 0, lowering.handle)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("k", torch.zeros(2, 2, 120, 16), ShapeMismatch),
        ("k", torch.zeros(1, 2, 120, 8), ShapeMismatch),
        ("v", torch.zeros(1, 2, 119, 16), ShapeMismatch),
        ("v", torch.zeros(1, 1, 120, 16), ShapeMismatch),
        ("mask", torch.zeros(1, 3, 1, 120), ShapeMismatch),
        ("lengths", torch.zeros(0, dtype=torch.int64), ShapeMismatch),
        ("lengths", torch.zeros(2, 3, dtype=torch.int64), ShapeMismatch),
        ("lengths", torch.zeros(3, dtype=torch.int32), DtypeMismatch),
        ("theta", torch.zeros(4, 2), ShapeMismatch),
        ("theta", torch.zeros(3, 3), ShapeMismatch),
        ("theta", torch.zeros(12), ShapeMismatch),
        ("theta", torch.zeros(4, 3).half(), DtypeMismatch),
        ("lost", torch.zeros(4, 2), ShapeMismatch),
        ("lost", torch.zeros(1, 3), ShapeMismatch),
    ],
)
def test_malformed_operands_are_refused(name: str, value: Tensor, error: type[Exception]) -> None:
    one = case(form=("pre", "offline"), mask="float")
    setattr(one, name, value)
    with pytest.raises(error, match=f"{name} "):
        one.operator()


@pytest.mark.parametrize(
    ("mean", "error"),
    [(torch.zeros(1, 2, 16), ShapeMismatch), (torch.zeros(1, 4, 16).half(), DtypeMismatch)],
)
def test_another_mean_is_refused(mean: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="v_mean"):
        case(v_mean=True).run(mean)


SPEC = case().spec


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (replace(SPEC, phase="prefill"), "not theta prefill"),
        (replace(SPEC, method="skip_softmax"), "not skip_softmax decode"),
        (replace(SPEC, options=("64", "middle", "exact", "True")), "middle"),
        (replace(SPEC, heads=130), "more than 64 query heads"),
    ],
)
def test_declines_with_a_reason(spec: AttentionSpec, reason: str) -> None:
    answer = TritonThetaDecode().accepts(spec)
    assert answer is not None and reason in answer
