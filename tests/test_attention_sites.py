"""Which attentions thresholds may be laid on: read through both doors, cross-attention declined."""

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, fx, nn

from sparsefx.attention.sites import AttentionSite, attention_names, shape_text, sites
from sparsefx.graph import capture
from sparsefx.passes.detect import Detect
from sparsefx.passes.fuse_attention import FuseAttention
from sparsefx.pipeline import PassContext, run
from sparsefx.rewrite import Decline
from tests import hf_models
from tests.attention_models import Compiled, nano_gpt, qkv
from tests.pass_models import x_of

PASSES = (Detect(attention=True), FuseAttention())
implementations = pytest.mark.parametrize("implementation", ["eager", "sdpa"])


def verdicts(found: list[AttentionSite | Decline]) -> list[str]:
    """ "" for a site, else the reason."""
    return [each.reason if isinstance(each, Decline) else "" for each in found]


def read_all(model: nn.Module, *args: Tensor, **kwargs: Tensor) -> list[AttentionSite | Decline]:
    gm = capture(model, args, kwargs)
    run(gm, PASSES, PassContext())
    return [found for _, found in sites(gm)]


class Attend(nn.Module):
    """Attention of width 16 with separate projections and what is done around them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(16, 16, dtype=torch.float64) for _ in "qkv")
        self.norm = nn.LayerNorm(8, dtype=torch.float64)
        self.latents = nn.Parameter(x_of(1, 3, 16))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.view(x.shape[0], -1, 2, 8).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v)


class SelfAttention(Attend):
    def forward(self, x: Tensor) -> Tensor:
        return self.attend(self.q(x), self.k(x), self.v(x))


class WithPositions(Attend):
    """Positions are added to what is projected, each time anew; heads are normalised."""

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        q, k = self.q(x + places), self.k(x + places)
        q, k = (self.norm(each.view(-1, 2, 8)).view(each.shape) for each in (q, k))
        return self.attend(q, k, self.v(x))


class WithCache(Attend):
    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        k, v = torch.cat([keys, self.k(x)], 1), torch.cat([values, self.v(x)], 1)
        return self.attend(self.q(x), k, v)


class WithCacheInPlace(Attend):
    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        keys[:, -1:] = self.k(x)
        values[:, -1:] = self.v(x)
        return self.attend(self.q(x), keys, values)


class Residual(Attend):
    """Keys of the same layer's input, after it went through something without a projection."""

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(self.q(x), x, x)


class Cross(Attend):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.attend(self.q(x), self.k(other), self.v(other))


class CachedCross(Attend):
    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self.attend(self.q(x), keys, values)


class Latents(Attend):
    def forward(self, x: Tensor) -> Tensor:
        q = self.q(self.latents).expand(x.shape[0], -1, -1)
        return self.attend(q, self.k(x), self.v(x))


X, PLACES, PAST = x_of(2, 6, 16), x_of(1, 6, 16), x_of(2, 6, 16, seed=3)
LAST = x_of(2, 1, 16, seed=4)
SELF: dict[str, tuple[type[nn.Module], tuple[Tensor, ...]]] = {
    "plain": (SelfAttention, (X,)),
    "positions": (WithPositions, (X, PLACES)),
    "cache": (WithCache, (LAST, PAST, PAST)),
    "cache in place": (WithCacheInPlace, (LAST, PAST, PAST)),
    "keys are the input": (Residual, (X,)),
}
CROSS: dict[str, tuple[type[nn.Module], tuple[Tensor, ...], str]] = {
    "two inputs": (Cross, (X, PAST), "another source than its queries"),
    "cached": (CachedCross, (LAST, PAST, PAST), "no projection of the layer's input"),
    "latents": (Latents, (X,), "another source than its queries"),
}


@pytest.mark.parametrize("name", SELF)
def test_self_attention_is_a_site(name: str) -> None:
    kind, args = SELF[name]
    assert verdicts(read_all(kind(), *args)) == [""]
    compiled = Compiled(kind(), PASSES)
    compiled.call(*(each.clone() for each in args))
    assert [verdicts(found) for found in compiled.found] == [[""]]


@pytest.mark.parametrize("name", CROSS)
def test_cross_attention_declines(name: str) -> None:
    kind, args, reason = CROSS[name]
    (found,) = verdicts(read_all(kind(), *args))
    assert found == f"cross-attention: its keys come from {reason}"
    compiled = Compiled(kind(), PASSES)
    compiled.call(*args)
    assert [verdicts(each) for each in compiled.found] == [[found]]


class Plain(nn.Module):
    """Like a function: q, k, v are inputs."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(
    ("queries", "keys", "verdict"),
    [
        (6, 6, ""),
        (1, 6, ""),
        (2, 6, ""),  # a chunk behind a cache
        (6, 2, "cross-attention: it has fewer keys than queries"),
    ],
)
def test_inputs_are_judged_by_their_lengths(queries: int, keys: int, verdict: str) -> None:
    q, (_, k, v) = qkv(queries)[0], qkv(keys)
    (found,) = read_all(Plain(), q, k, v)
    assert verdicts([found]) == [verdict]
    if isinstance(found, AttentionSite):
        assert (found.queries, found.keys, found.is_decode) == (queries, keys, queries == 1)
        assert shape_text(found.node) == f"4x8 heads @ {queries} x {keys}"


def decoder(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """An encoder-decoder model of two layers each and the encoder's inputs."""
    torch.manual_seed(0)
    if name == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
        config = hf.T5Config(vocab_size=96, decoder_start_token_id=0, dropout_rate=0.0, **sizes)
        return hf.T5ForConditionalGeneration(config).eval(), {"input_ids": hf_models.ids(2, 7)}
    config = hf.WhisperConfig(
        **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
        **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": 64 for part in ("encoder", "decoder")},
        **{f"{part}_token_id": number for number, part in enumerate(("pad", "bos", "eos"))},
        d_model=32,
        num_mel_bins=8,
        max_source_positions=16,
        vocab_size=96,
        decoder_start_token_id=1,
    )
    features = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    return hf.WhisperForConditionalGeneration(config).eval(), {"input_features": features}


@implementations
@pytest.mark.parametrize("name", ["t5", "whisper"])
@torch.no_grad()
def test_decoders_decline_their_cross_attention_only(name: str, implementation: str) -> None:
    model, inputs = decoder(name)
    model.set_attn_implementation(implementation)
    ids = hf_models.ids(2, 5)
    found = verdicts(read_all(model, **inputs, decoder_input_ids=ids, use_cache=False))
    other = "cross-attention: its keys come from another source than its queries"
    assert found == ["", "", "", other, "", other]

    states = model.get_encoder()(**inputs)
    full = model(encoder_outputs=states, decoder_input_ids=ids, use_cache=True)
    compiled = Compiled(model, PASSES)
    compiled.call(
        encoder_outputs=states, decoder_input_ids=ids[:, :1], past_key_values=full.past_key_values
    )
    cached = "cross-attention: its keys come from no projection of the layer's input"
    assert [verdicts(each) for each in compiled.found] == [["", cached, "", cached]]


@implementations
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_decoding_with_a_cache_is_self_attention(kind: str, implementation: str) -> None:
    case = hf_models.llama()
    case.model.set_attn_implementation(implementation)
    ids = hf_models.ids(2, 8)
    cache = hf.DynamicCache(config=case.model.config)
    if kind == "static":
        cache = hf.StaticCache(config=case.model.config, max_cache_len=16)
    case.model(input_ids=ids[:, :7], past_key_values=cache)
    compiled = Compiled(case.model, PASSES)
    compiled.call(input_ids=ids[:, 7:], past_key_values=cache)
    assert [verdicts(each) for each in compiled.found] == [["", ""]]
    for site in compiled.found[0]:
        assert isinstance(site, AttentionSite)
        assert site.is_decode and (site.heads, site.kv_heads) == (4, 2)


def names(gm: fx.GraphModule) -> list[str]:
    return list(attention_names(gm).values())


def test_names_are_module_paths() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Plain()

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            x = F.scaled_dot_product_attention(q, k, v)
            return (
                self.inner(q, x, v) + self.inner(x, k, v) + F.scaled_dot_product_attention(x, k, v)
            )

    gm = capture(Twice(), qkv())
    assert names(gm) == ["attention", "inner", "inner#2", "attention#2"]
    compiled = Compiled(Twice(), PASSES)
    compiled.call(*qkv())
    seen = [each.name for each in compiled.found[0] if isinstance(each, AttentionSite)]
    assert seen == names(gm)


def test_rows_are_named_like_sites() -> None:
    gm, ctx = capture(nano_gpt(), (x_of(2, 5, 32),)), PassContext()
    run(gm, PASSES, ctx)
    rows = [row.name for row in ctx.rows.values() if row.op == "attention"]
    assert rows == names(gm) == ["blocks.0", "blocks.1"]


DECLINED = {
    "is_causal": (lambda q, k, v: (q[:, :, :3], k, v, True), "aligns to the top left"),
    "value dim": (lambda q, k, v: (q, k, v[..., :4], False), "do not fit together"),
    "three axes": (lambda q, k, v: (q[:, 0], k[:, 0], v[:, 0], False), r"\[batch, heads"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_what_no_threshold_fits(name: str) -> None:
    change, reason = DECLINED[name]

    class Changed(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            *operands, is_causal = change(q, k, v)
            return F.scaled_dot_product_attention(*operands, is_causal=is_causal)

    (found,) = verdicts(read_all(Changed(), *qkv()))
    assert reason.replace("\\", "") in found
