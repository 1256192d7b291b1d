"""Attention by hand becomes one node, through both doors, in float64; what cannot says why."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparsefx.attention.sites import AttentionSite, sites
from sparsefx.candidates import ATTENTION
from sparsefx.graph import capture
from sparsefx.passes.detect import Detect
from sparsefx.passes.fuse_attention import FuseAttention
from sparsefx.pipeline import PassContext, run
from tests.attention_models import (
    DECLINED,
    FUSED,
    GROUPED,
    KV_HEADS,
    Called,
    CausalSelfAttention,
    Compiled,
    LlamaAttention,
    grouped,
    nano_gpt,
    qkv,
)
from tests.golden import assert_golden
from tests.hf_models import CASES, Case
from tests.pass_models import after, assert_same_numbers, calls, text, x_of

PASSES = (Detect(attention=True), FuseAttention())
VARYING = torch.export.Dim.DYNAMIC
NUMBERS = {"rtol": 1e-12, "atol": 1e-12}
# Of what a model itself does in float32 in its softmax, float64 shows the rounding.
ROUNDED = {"rtol": 1e-5, "atol": 1e-6}
hand_written = pytest.mark.parametrize("name", FUSED)


def attentions(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.target is ATTENTION]


def rows(ctx: PassContext) -> Iterator[tuple[str, str]]:
    """(shape, reason) of each attention."""
    return ((row.shape, row.reason) for row in ctx.rows.values() if row.op == "attention")


@hand_written
def test_written_by_hand(name: str) -> None:
    model, args = Called(FUSED[name]), qkv()
    gm, ctx, counts = after(model, PASSES, *args)
    assert counts["fuse_attention"] == 1
    assert not {"aten.softmax.int", "aten.matmul.default"} & set(calls(gm))
    heads = f" ({1 if 'one' in name else KV_HEADS} KV)" if name in GROUPED else ""
    assert list(rows(ctx)) == [(f"4x8 heads{heads} @ 6 x 6", "")]
    assert attentions(gm)[0].kwargs.get("enable_gqa", False) == (name in GROUPED)
    tolerance = ROUNDED if "float32" in name else NUMBERS
    torch.testing.assert_close(gm(*args), model(*args), **tolerance)


@hand_written
def test_batch_and_length_vary(name: str) -> None:
    model, varying = Called(FUSED[name]), {0: VARYING, 2: VARYING}
    gm = capture(model, qkv(), dynamic_shapes={"q": varying, "k": varying, "v": varying})
    ctx = PassContext()
    assert run(gm, PASSES, ctx)["fuse_attention"] == 1
    (shape, reason), (node,) = next(rows(ctx)), attentions(gm)
    assert shape.endswith("@ 6.. x 6..") and not reason
    tolerance = ROUNDED if "float32" in name else NUMBERS
    for args in (qkv(), qkv(9, 3), qkv(4, 1)):
        torch.testing.assert_close(gm(*args), model(*args), **tolerance)
    assert node.meta["val"].shape[1:] == (4, node.meta["val"].shape[2], 8)


@hand_written
def test_through_dynamo(name: str) -> None:
    model = Called(FUSED[name])
    compiled = Compiled(model, PASSES)
    tolerance = ROUNDED if "float32" in name else NUMBERS
    sizes = ((6, 2), (9, 3), (5, 4)) if name in GROUPED else ((6, 2),)
    for args in (qkv(*each) for each in sizes):  # the second makes a graph of varying sizes
        torch.testing.assert_close(compiled.call(*args), model(*args), **tolerance)
    assert [counts["fuse_attention"] for counts in compiled.counts] == [1] * min(len(sizes), 2)
    for ctx in compiled.contexts:
        assert [reason for _, reason in rows(ctx)] == [""]


@pytest.mark.parametrize("name", DECLINED)
@pytest.mark.parametrize("door", ["export", "dynamo"])
def test_what_is_left_says_why(name: str, door: str) -> None:
    forward, reason = DECLINED[name]
    model, args = Called(forward), qkv()
    if door == "export":
        gm, ctx, counts = after(model, PASSES, *args)
        call = gm
    else:
        compiled = Compiled(model, PASSES)
        compiled.call(*(each.clone() for each in args))
        ctx, counts, call = compiled.contexts[0], compiled.counts[0], compiled.call
    assert counts["fuse_attention"] == 0
    ((_, found),) = rows(ctx)
    assert reason.replace("\\", "") in found and found.startswith("attention: ")
    if name != "dropout":
        results = (f(*(each.clone() for each in args)) for f in (call, model))
        torch.testing.assert_close(*results, **NUMBERS)


@pytest.mark.parametrize("door", ["export", "dynamo"])
def test_nano_gpt(door: str) -> None:
    model, x = nano_gpt(), x_of(2, 7, 32)
    if door == "export":
        gm, ctx, counts = after(model, PASSES, x)
        assert_same_numbers(gm, model, x)
        assert [found.name for _, found in sites(gm)] == ["blocks.0", "blocks.1"]
        assert all("masked_fill" not in call for call in calls(gm))
    else:
        compiled = Compiled(model, PASSES)
        for each in (x, x_of(3, 9, 32)):
            torch.testing.assert_close(compiled.call(each), model(each), **NUMBERS)
        ctx, counts = compiled.contexts[-1], compiled.counts[-1]
        assert [found.name for found in compiled.found[-1]] == ["blocks.0", "blocks.1"]
    assert counts["fuse_attention"] == 2
    assert all(not reason for _, reason in rows(ctx))


def test_training_keeps_its_dropout() -> None:
    model = CausalSelfAttention().double().train()
    _, ctx, counts = after(model, PASSES, x_of(2, 5, 32))
    assert counts["fuse_attention"] == 0
    assert [reason for _, reason in rows(ctx)] == ["attention: dropout is on, as in training"]


def of_hugging_face(name: str, implementation: str) -> tuple[Case, dict[str, object]]:
    torch.manual_seed(0)
    case = CASES[name]()
    case.model.set_attn_implementation(implementation)
    if name == "llama_padded":  # whose softmax is in float32, where float64's lowest is -inf
        return case, case.kwargs
    return case._replace(model=case.model.double()), {
        key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in case.kwargs.items()
    }


def first(result: object) -> Tensor:
    found = result.logits if "logits" in dir(result) else result[0]  # type: ignore[index]
    assert isinstance(found, Tensor)
    return found


MODELS = ("llama", "llama_padded", "bert", "vit", "t5_encoder", "whisper_encoder", "gpt2")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", [*MODELS, "llama_cached"])
@torch.no_grad()
def test_hugging_face(name: str, implementation: str) -> None:
    case, kwargs = of_hugging_face(name, implementation)
    expected = first(case.model(**kwargs))
    assert expected.isfinite().all()
    repeats = name in ("llama", "llama_padded")
    due = 2 if implementation == "eager" or repeats else 0
    compiled = Compiled(case.model, PASSES)
    results = [first(compiled.call(**kwargs))]
    counts, contexts, found = compiled.counts, compiled.contexts, compiled.found
    if name != "llama_cached":  # torch.export has no place for the cache that it returns
        gm, ctx = capture(case.model, (), kwargs), PassContext()
        counts.append(run(gm, PASSES, ctx))
        contexts.append(ctx)
        found.append([each for _, each in sites(gm)])
        results.append(first(gm(**kwargs)))
    for result in results:
        torch.testing.assert_close(result, expected, **ROUNDED)
    assert [each["fuse_attention"] for each in counts] == [due] * len(results)
    kv_heads = 2 if "llama" in name else 4
    for each in found:
        assert [isinstance(site, AttentionSite) and site.kv_heads for site in each] == [
            kv_heads
        ] * 2
    assert all(not reason for ctx in contexts for _, reason in rows(ctx))


def test_softmax_of_something_else_has_no_row() -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.softmax(q + k, -1) * v

    gm, ctx, counts = after(Called(forward), PASSES, *qkv())
    assert (counts["fuse_attention"], ctx.rows) == (0, {})
    assert "aten.softmax.int" in calls(gm)


class Repeats(nn.Module):
    """scaled_dot_product_attention in Hugging Face's second form."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, grouped(k), grouped(v), attn_mask=mask, scale=0.3)


def test_repeated_heads_are_read_as_they_are_stored() -> None:
    model, mask = Repeats(), torch.rand(2, 1, 6, 6) < 0.8
    mask |= torch.eye(6, dtype=torch.bool)
    gm, _, counts = after(model, PASSES, *qkv(), mask)
    assert counts["fuse_attention"] == 1
    (node,) = attentions(gm)
    assert [each.meta["val"].shape[1] for each in node.args[:3]] == [4, 2, 2]
    assert node.kwargs == {"scale": 0.3, "enable_gqa": True}
    assert not {"aten.expand.default", "aten.reshape.default"} & set(calls(gm))
    assert_same_numbers(gm, model, *qkv(), mask)


def test_heads_repeated_in_another_order_stay() -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (torch.cat([each[:, :2], each[:, :2]], 1) for each in (k, v))
        tiled = k[:, None, :2].expand(2, 2, 2, 6, 8).reshape(2, 4, 6, 8)
        return F.scaled_dot_product_attention(q, tiled, v)

    gm, _, counts = after(Called(forward), PASSES, *qkv())
    assert counts["fuse_attention"] == 0
    assert_same_numbers(gm, Called(forward), *qkv())


def test_golden() -> None:
    """One Llama layer, as Hugging Face writes it without a kernel."""
    layer = LlamaAttention("eager")
    gm = capture(layer, layer.inputs())
    before = text(gm)
    assert run(gm, PASSES, PassContext())["fuse_attention"] == 1
    assert_golden("passes/fuse_attention.txt", f"{before}\n# =>\n\n{text(gm)}")
