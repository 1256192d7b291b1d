"""Thresholds in the graph mean what the operators mean; attentions without any say so."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

from sparsefx.attention import meaning
from sparsefx.attention.dense import dense_attention
from sparsefx.attention.operators import SKIP_SOFTMAX, THETA
from sparsefx.attention.thresholds import AttentionThresholds, SkipThresholds, ThetaThresholds
from sparsefx.attention.wanted import Wanted
from sparsefx.errors import HeadsMismatch
from sparsefx.graph import capture
from sparsefx.passes.detect import NOT_ASKED, Detect
from sparsefx.passes.fuse_attention import FuseAttention
from sparsefx.passes.threshold_softmax import ThresholdSoftmax
from sparsefx.pipeline import Pass, PassContext, run
from tests import hf_models
from tests.attention_models import Called, Compiled, LlamaAttention, future, nano_gpt, qkv, soft
from tests.golden import assert_golden
from tests.pass_models import Around, calls, text, x_of
from tests.test_attention_sites import CachedCross, Cross

HEADS = 4
SKIP = SkipThresholds(
    prefill=(30.0, 12.0, 50.0, 4.0), decode=(1.0, 2.0, 3.0, 4.0), tile=(16, 16), order="ascending"
)
THETAS = ThetaThresholds(
    k=4,
    lengths=(8, 40),
    theta=((0.1, 0.4), (0.0, 0.2), (-0.2, 0.3), (0.5, 0.6)),
    lost=((0.5, 0.6), (0.7, 0.8), (0.1, 0.2), (0.3, 0.4)),
    placement="pre",
    denominator="offline",
    v_mean=True,
)


def nothing_skipped(heads: int) -> SkipThresholds:
    """A factor of 0: lambda is 0, and no tile lies infinitely far below the maximum."""
    return replace(SKIP, prefill=(0.0,) * heads, decode=(0.0,) * heads)


def passes(thresholds: dict[str, AttentionThresholds]) -> tuple[Pass, ...]:
    asked = bool(thresholds)
    return (Detect(attention=asked), FuseAttention(), ThresholdSoftmax(Wanted(thresholds)))


def sparse(
    model: nn.Module, thresholds: dict[str, AttentionThresholds], *args: Tensor
) -> tuple[fx.GraphModule, PassContext, int]:
    gm, ctx = capture(model, args), PassContext()
    return gm, ctx, run(gm, passes(thresholds), ctx)["threshold_softmax"]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(-2, -1) * 0.5).masked_fill(future(q, k), float("-inf"))
    return soft(scores) @ v


def sloped(length: int) -> tuple[Tensor, ...]:
    """q, k, v with a sink and distance decay: tiles in the middle weigh nothing."""
    q, k, v = qkv(length)
    places = torch.arange(length, dtype=torch.float64)
    q[..., 0], k[..., 0] = 4.0, places / length * 6
    k[:, :, 0, 0] = 8.0
    return q, k, v


def skip_meaning(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    factors = (torch.tensor(each) for each in (SKIP.prefill, SKIP.decode))
    mask = ~future(q, k)[None, None]
    return meaning.skip_softmax_attention(
        q, k, v, mask, *factors, False, 0.5, 0, *SKIP.tile, SKIP.order
    )


def theta_meaning(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    tables = (torch.tensor(each) for each in (THETAS.lengths, THETAS.theta, THETAS.lost))
    mask = ~future(q, k)[None, None]
    return meaning.theta_attention(
        q, k, v, mask, *tables, False, 0.5, 0, THETAS.k, "pre", "offline", True
    )


Meaning = Callable[[Tensor, Tensor, Tensor], Tensor]
METHODS: dict[str, tuple[AttentionThresholds, Meaning, object, str]] = {
    "skip": (SKIP, skip_meaning, SKIP_SOFTMAX, "skip-softmax 16x16"),
    "theta": (THETAS, theta_meaning, THETA, "top-theta k=4"),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("door", ["export", "dynamo"])
def test_numbers_are_the_meaning(name: str, door: str) -> None:
    thresholds, meant, target, pattern = METHODS[name]
    model, args = Called(causal), sloped(40)
    if door == "export":
        gm, ctx, count = sparse(model, {"attention": thresholds}, *args)
        (node,) = gm.graph.find_nodes(op="call_function", target=target)
        assert node.meta["sparsefx"] == "threshold_softmax"
        result = gm(*args)
    else:
        compiled = Compiled(model, passes({"attention": thresholds}))
        result = compiled.call(*args)
        ctx, count = compiled.contexts[0], compiled.counts[0]["threshold_softmax"]
    assert count == 1
    torch.testing.assert_close(result, meant(*args), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(result, model(*args), atol=1e-6)  # something was left out
    (row,) = ctx.rows.values()
    assert (row.name, row.pattern, row.reason) == ("attention", pattern, "")
    assert row.shape == "4x8 heads @ 40 x 40"


def test_the_node_has_the_memory_that_its_operator_returns() -> None:
    gm, _, _ = sparse(Called(causal), {"attention": SKIP}, *qkv(20))
    (node,) = gm.graph.find_nodes(op="call_function", target=SKIP_SOFTMAX)
    real = skip_meaning(*qkv(20))
    assert node.meta["val"].shape == real.shape
    assert node.meta["val"].stride() == real.stride()
    prefill, decode = node.args[4:6]
    assert [each.meta["val"].tolist() for each in (prefill, decode)] == [
        list(SKIP.prefill),
        list(SKIP.decode),
    ]
    assert all(each.meta["val"].dtype == torch.float32 for each in (prefill, decode))


def test_a_view_of_the_result_keeps_working() -> None:
    def viewed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal(q, k, v).view(q.shape[0] * HEADS, -1, 8)

    gm, _, count = sparse(Called(viewed), {"attention": nothing_skipped(HEADS)}, *qkv())
    assert count == 1
    torch.testing.assert_close(gm(*qkv()), viewed(*qkv()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [1, 5, 33])
@pytest.mark.parametrize("masked", [False, True])
def test_factor_zero_is_dense(length: int, masked: bool) -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal(q, k, v) if masked else soft(q @ k.mT) @ v

    gm, _, count = sparse(Called(forward), {"attention": nothing_skipped(HEADS)}, *qkv(length))
    assert count == 1
    mask = ~future(*qkv(length)[:2]) if masked else None
    expected = dense_attention(*qkv(length), mask, False, 0.5 if masked else 1.0, 0)
    torch.testing.assert_close(gm(*qkv(length)), expected, rtol=1e-12, atol=1e-12)


MODELS = ("llama", "llama_padded", "llama_cached", "bert", "vit", "t5_encoder", "gpt2")


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_hugging_face_with_factor_zero_is_dense(name: str) -> None:
    torch.manual_seed(0)
    case = hf_models.CASES[name]()
    probe = Compiled(case.model, passes({}))
    expected = probe.call(**case.kwargs)[0]
    found = [row.name for row in probe.contexts[0].rows.values() if row.op == "attention"]
    assert len(found) == 2
    compiled = Compiled(case.model, passes({each: nothing_skipped(HEADS) for each in found}))
    result = compiled.call(**case.kwargs)[0]
    assert compiled.counts[0]["threshold_softmax"] == 2
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    patterns = [r.pattern for r in compiled.contexts[0].rows.values() if r.op == "attention"]
    assert patterns == ["skip-softmax 16x16"] * 2


def reasons(ctx: PassContext) -> list[str]:
    return [row.reason for row in ctx.rows.values() if row.op == "attention"]


def test_without_a_request_every_row_says_so() -> None:
    gm, ctx, count = sparse(nano_gpt(), {}, x_of(2, 5, 32))
    assert (count, reasons(ctx)) == (0, [NOT_ASKED] * 2)
    assert not any("sparsefx" in call for call in calls(gm))


def test_an_attention_without_thresholds_says_so() -> None:
    _, ctx, count = sparse(nano_gpt(), {"blocks.1": SKIP}, x_of(2, 5, 32))
    assert (count, reasons(ctx)) == (1, ["attention: no thresholds were calibrated for it", ""])


@pytest.mark.parametrize(
    ("model", "args"),
    [
        (Cross(), (x_of(2, 6, 16), x_of(2, 6, 16, seed=2))),
        (CachedCross(), (x_of(2, 1, 16), x_of(2, 6, 16), x_of(2, 6, 16))),
    ],
)
def test_cross_attention_stays_dense(model: nn.Module, args: tuple[Tensor, ...]) -> None:
    gm, ctx, count = sparse(model, {"attention": SKIP}, *args)
    assert count == 0
    assert reasons(ctx)[0].startswith("cross-attention: its keys come from")
    torch.testing.assert_close(gm(*args), model(*args), rtol=1e-12, atol=1e-12)


def test_returned_weights_keep_their_reason() -> None:
    def returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = soft(q @ k.mT)
        return weights @ v, weights

    _, ctx, count = sparse(Called(returned), {"attention": SKIP}, *qkv())
    assert count == 0
    assert "its weights are returned" in reasons(ctx)[0]


@pytest.mark.parametrize("thresholds", [SKIP, THETAS])
def test_thresholds_of_another_model_are_an_error(thresholds: AttentionThresholds) -> None:
    three = tuple(each[:, :3] for each in qkv())
    with pytest.raises(HeadsMismatch, match="for 4 heads and it has 3"):
        sparse(Called(causal), {"attention": thresholds}, *three)


def test_equal_names_after_cleaning_keep_their_own_thresholds() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_b, self.a = Called(causal), nn.Module()
            self.a.b = Called(causal)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.a.b(q, k, self.a_b(q, k, v))

    other = replace(SKIP, prefill=(1.0, 2.0, 3.0, 4.0))
    gm, _, count = sparse(Two(), {"a_b": SKIP, "a.b": other}, *qkv(20))
    assert count == 2
    found = gm.graph.find_nodes(op="call_function", target=SKIP_SOFTMAX)
    held = [tuple(node.args[4].meta["val"].tolist()) for node in found]
    assert held == [SKIP.prefill, other.prefill]


def test_lengths_vary() -> None:
    varying = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    shapes = dict.fromkeys(("q", "k", "v"), varying)
    gm, ctx = capture(Called(causal), sloped(24), dynamic_shapes=shapes), PassContext()
    run(gm, passes({"attention": SKIP}), ctx)
    (row,) = ctx.rows.values()
    assert row.shape == "4x8 heads @ 24.. x 24.."
    for length in (40, 17):
        args = sloped(length)
        torch.testing.assert_close(gm(*args), skip_meaning(*args), rtol=1e-12, atol=1e-12)


def test_golden() -> None:
    """One Llama layer, as Hugging Face calls scaled_dot_product_attention."""
    layer, ctx = LlamaAttention("sdpa"), PassContext()
    gm = capture(layer, layer.inputs())
    run(gm, (Detect(attention=True), FuseAttention()), ctx)
    before = text(gm)
    counts = run(gm, (ThresholdSoftmax(Wanted({"self_attn": SKIP})),), ctx)
    assert counts["threshold_softmax"] == 1
    assert_golden("passes/threshold_softmax.txt", f"{before}\n# =>\n\n{text(gm)}")


def test_detect_leaves_the_reason_to_the_pass() -> None:
    model = Around(lambda s, q, k, v: causal(q, k, v))
    for asked, reason in ((False, NOT_ASKED), (True, "")):
        gm, ctx = capture(model, qkv()), PassContext()
        assert run(gm, (Detect(attention=asked),), ctx)["detect"] == 0
        assert reasons(ctx) == [reason]
