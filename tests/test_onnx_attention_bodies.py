"""The ONNX bodies of sparse attention in onnxruntime against their meaning in float64."""

import itertools

import onnx_ir as ir
import pytest
import torch
from torch import Tensor

from sparsefx.attention import meaning
from sparsefx.codegen.onnx.attention_functions import (
    BLOCK,
    SKIP_SOFTMAX,
    THETA,
    AttentionVariant,
)
from tests.attention_cases import Sizes, masks
from tests.onnx_attention import exact, exact_inputs, run_node

FLOAT = ir.DataType.FLOAT
MASKS = {"none": None, "bool": ir.DataType.BOOL, "float": FLOAT}
SCALE = 0.25
PLACES = ((True, 0), (False, 0), (True, 37), (False, 37))  # is_causal, window
TILE = (32, 16)
CORNERS = ((True, 37), (False, 0))
HEADS = ((4, 2), (3, 3))


def variant(
    name: str, sizes: Sizes, mask: str, place: tuple[bool, int], *options: str, phase: str = ""
) -> AttentionVariant:
    grouped = sizes.heads != sizes.kv_heads
    is_causal = place[0] and phase != "decode"
    window = place[1] > 0
    return AttentionVariant(name, FLOAT, phase, grouped, MASKS[mask], is_causal, window, options)


def exact_mask(sizes: Sizes, kind: str) -> Tensor | None:
    mask = masks(sizes, seed=3)[kind]
    return exact(mask) if kind == "float" else mask


def narrow(value: Tensor | None) -> Tensor | None:
    return value.float() if value is not None and value.is_floating_point() else value


def run_skip_softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    factors: tuple[Tensor, Tensor],
    body: AttentionVariant,
    place: tuple[bool, int],
    opset: int = 20,
) -> Tensor:
    return run_node(
        body,
        {"q": q.float(), "k": k.float(), "v": v.float(), "mask": narrow(mask),
         "prefill": factors[0], "decode": factors[1]},
        {"is_causal": int(place[0]), "scale": SCALE, "window": place[1],
         "block_q": TILE[0], "block_k": TILE[1], "order": body.options[0]},
        opset,
    )  # fmt: skip


def factors_of(heads: int) -> tuple[Tensor, Tensor]:
    """For prefill and decode; in decode neighbours, which share K, want other tiles."""
    return torch.linspace(0.5, 9.0, heads), torch.tensor([90.0, 0.3] * heads)[:heads]


@pytest.mark.parametrize("order", ["ascending", "sink_diagonal"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("queries", [1, 100])
def test_skip_softmax(queries, heads, mask, order):
    sizes = Sizes(heads=heads[0], kv_heads=heads[1], queries=queries)
    q, k, v = exact_inputs(sizes, seed=1)
    factors = factors_of(heads[0])
    factor = factors[1] if queries == 1 else factors[0]
    seen, skipped = exact_mask(sizes, mask), 0
    for place, phase in itertools.product(PLACES, ("any", "decode" if queries == 1 else "prefill")):
        arguments = (*factors, place[0], SCALE, place[1], *TILE, order)
        expected = meaning.skip_softmax_attention(q, k, v, seen, *arguments)
        body = variant(SKIP_SOFTMAX, sizes, mask, place, order, phase=phase)
        opset = 24 if place[0] else 20
        found = run_skip_softmax(q, k, v, seen, factors, body, place, opset)
        torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)
        s = meaning.scores(q, k, seen, place[0], SCALE, place[1])
        keep = meaning.kept_tiles(s, sizes.kv_heads, factor, *TILE, order)
        visible = meaning.kept_tiles(s, sizes.kv_heads, factor * 0, *TILE, order)
        skipped += int((visible & ~keep).sum())
    assert skipped > 0


def test_rows_that_see_nothing_are_zero_and_do_not_vote():
    sizes = Sizes(queries=100)
    q, k, v = exact_inputs(sizes, seed=1)
    mask = torch.ones(2, 1, 100, 130, dtype=torch.bool)
    mask[:, :, ::20] = False
    factors, place = factors_of(4), (False, 0)
    body = variant(SKIP_SOFTMAX, sizes, "bool", place, "ascending", phase="any")
    found = run_skip_softmax(q, k, v, mask, factors, body, place)
    expected = meaning.skip_softmax_attention(
        q, k, v, mask, *factors, False, SCALE, 0, *TILE, "ascending"
    )
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)
    assert not found[:, :, ::20].any()
    assert found[:, :, 1].any()


def test_a_nan_stays_in_its_row():
    sizes = Sizes(queries=100)
    q, k, v = exact_inputs(sizes, seed=1)
    q[0, 0, 3] = float("nan")
    body = variant(SKIP_SOFTMAX, sizes, "none", (True, 0), "ascending", phase="any")
    found = run_skip_softmax(q, k, v, None, factors_of(4), body, (True, 0))
    where = found.isnan().any(-1).nonzero().tolist()
    assert where == [[0, 0, 3]]


def theta_table(q: Tensor, k: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Lengths and thresholds near the upper quantile of each head's scores."""
    s = meaning.scores(q, k, None, False, SCALE, 0)
    top = s.flatten(2).quantile(1 - share, -1).mean(0)
    lengths = torch.tensor([10, 40, 90, 120])
    return lengths, (top[:, None] + torch.tensor([-0.51, 0.13, 0.37, -0.77])).float()


@pytest.mark.parametrize("denominator", ["exact", "exp_threshold", "offline", "none"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("queries", [1, 130])
def test_theta_before_the_softmax(queries, mask, denominator):
    for heads, place, v_mean in itertools.product(HEADS, CORNERS, (True, False)):
        sizes = Sizes(heads=heads[0], kv_heads=heads[1], queries=queries)
        check_theta(sizes, mask, place, "pre", denominator, v_mean)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("queries", [1, 130])
def test_theta_after_the_softmax(queries, mask):
    for heads, place, v_mean in itertools.product(HEADS, CORNERS, (True, False)):
        sizes = Sizes(heads=heads[0], kv_heads=heads[1], queries=queries)
        check_theta(sizes, mask, place, "post", "exact", v_mean)


def check_theta(sizes, mask, place, placement, denominator, v_mean):
    q, k, v = exact_inputs(sizes, seed=2)
    seen = exact_mask(sizes, mask)
    lengths, theta = theta_table(q, k, 0.2)
    if placement == "post":
        theta = theta.sub(theta.amax()).mul(0.3).exp() * 0.02
    lost = theta.abs() * 0.1 if denominator == "offline" else None
    options = (12, placement, denominator, v_mean)
    arguments = (lengths, theta, lost, place[0], SCALE, place[1], *options)
    expected = meaning.theta_attention(q, k, v, seen, *arguments)
    found = run_node(
        variant(THETA, sizes, mask, place, placement, denominator, "v_mean" if v_mean else ""),
        {"q": q.float(), "k": k.float(), "v": v.float(), "mask": narrow(seen),
         "lengths": lengths, "theta": theta, "lost": lost},
        {"is_causal": int(place[0]), "scale": SCALE, "window": place[1], "topk": 12,
         "placement": placement, "denominator": denominator, "v_mean": int(v_mean)},
        opset=24 if v_mean else 20,
    )  # fmt: skip
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)
    dense = meaning.theta_attention(q, k, v, seen, lengths, theta - 1e9, *arguments[2:])
    assert (expected - dense).abs().max() > 1e-3


@pytest.mark.parametrize("points", [1, 2])
def test_a_short_table(points):
    sizes = Sizes(queries=100)
    q, k, v = exact_inputs(sizes, seed=5)
    lengths, theta = (each[..., :points] for each in theta_table(q, k, 0.2))
    expected = meaning.theta_attention(
        q, k, v, None, lengths, theta, None, True, SCALE, 0, 12, "pre", "exact", True
    )
    found = run_node(
        variant(THETA, sizes, "none", (True, 0), "pre", "exact", "v_mean"),
        {"q": q.float(), "k": k.float(), "v": v.float(), "mask": None,
         "lengths": lengths, "theta": theta, "lost": None},
        {"is_causal": 1, "scale": SCALE, "window": 0, "topk": 12,
         "placement": "pre", "denominator": "exact", "v_mean": 1},
    )  # fmt: skip
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("queries", [1, 100])
def test_block(queries, heads, mask):
    sizes = Sizes(heads=heads[0], kv_heads=heads[1], queries=queries)
    q, k, v = exact_inputs(sizes, seed=4)
    seen = exact_mask(sizes, mask)
    generator = torch.Generator().manual_seed(0)
    for place, shape in itertools.product(CORNERS, ((2, heads[0]), (1, 1))):
        keep = torch.rand(*shape, -(-queries // 64), 3, generator=generator) < 0.5
        expected = meaning.block_attention(q, k, v, seen, keep, place[0], SCALE, place[1], 64, 64)
        found = run_node(
            variant(BLOCK, sizes, mask, place),
            {"q": q.float(), "k": k.float(), "v": v.float(), "mask": narrow(seen), "keep": keep},
            {"is_causal": int(place[0]), "scale": SCALE, "window": place[1],
             "block_q": 64, "block_k": 64},
            opset=24 if place[0] else 20,
        )  # fmt: skip
        assert not found.isnan().any()
        torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=0)
