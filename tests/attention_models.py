"""Attention written by hand in many ways, as functions of q, k, v, and a nanoGPT-like module."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparsefx.attention.sites import AttentionSite, sites
from sparsefx.graph import bind, unbind
from sparsefx.pipeline import Pass, PassContext, run
from sparsefx.rewrite import Decline
from tests import hf_models

Forward = Callable[[Tensor, Tensor, Tensor], object]
HEADS, KV_HEADS, LENGTH, DIM = 4, 2, 6, 8


def qkv(length: int = LENGTH, batch: int = 2, heads: int = HEADS) -> tuple[Tensor, ...]:
    """Float64 q, k, v of [batch, heads, length, dim]."""
    generator = torch.Generator().manual_seed(batch * 100 + length)
    shape = (batch, heads, length, DIM)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))


class Called(nn.Module):
    """A module around a function of q, k, v."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.function = forward

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> object:
        return self.function(q, k, v)


class CausalSelfAttention(nn.Module):
    """The attention of nanoGPT without flash attention: one projection, a buffer for the mask."""

    mask: Tensor

    def __init__(self, width: int = 32, heads: int = HEADS, block: int = 32) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)
        self.heads = heads
        self.register_buffer("mask", torch.tril(torch.ones(block, block)).view(1, 1, block, block))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.size()
        q, k, v = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.c_attn(x).split(width, dim=2)
        )
        weights = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        weights = weights.masked_fill(self.mask[:, :, :length, :length] == 0, float("-inf"))
        weights = self.dropout(F.softmax(weights, dim=-1))
        y = (weights @ v).transpose(1, 2).contiguous().view(batch, length, width)
        return self.c_proj(y)


class LlamaAttention(nn.Module):
    """The attention of one Llama layer, of float32; 4 heads of 8, 2 KV heads, width 32."""

    def __init__(self, implementation: str) -> None:
        super().__init__()
        model = hf_models.llama().model
        model.set_attn_implementation(implementation)
        self.self_attn = model.get_submodule("model.layers.0.self_attn")

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        return self.self_attn(x, position_embeddings=(cos, sin), attention_mask=mask)[0]

    def inputs(self, length: int = 5) -> tuple[Tensor, ...]:
        """x, rope and an additive mask for one sequence."""
        x, rope = torch.zeros(1, length, 32), torch.ones(1, length, 8)
        return x, rope, rope * 0, torch.zeros(1, 1, length, length)


def nano_gpt() -> nn.Module:
    """Two such attentions with residuals, in float64 and eval mode."""

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([CausalSelfAttention(), CausalSelfAttention()])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = x + block(x)
            return x

    torch.manual_seed(0)
    return Blocks().double().eval()


def future(q: Tensor, k: Tensor) -> Tensor:
    """Bool [queries, keys], True where a query must not look."""
    return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)


def distance(q: Tensor, k: Tensor) -> Tensor:
    """A bias [heads, queries, keys] that falls with distance, as ALiBi's."""
    rows, columns = torch.arange(q.shape[-2]), torch.arange(k.shape[-2])
    slopes = torch.arange(1, HEADS + 1)[:, None, None] / 8
    return -(rows[:, None] - columns[None, :]).abs().to(q.dtype) * slopes.to(q.dtype)


def grouped(x: Tensor) -> Tensor:
    """The first KV_HEADS heads, each repeated as Hugging Face's repeat_kv does it."""
    batch, heads, length, dim = x[:, :KV_HEADS].shape
    times = HEADS // KV_HEADS
    spread = x[:, :KV_HEADS][:, :, None, :, :].expand(batch, heads, times, length, dim)
    return spread.reshape(batch, heads * times, length, dim)


def late(x: Tensor) -> Tensor:
    """The same, repeated before its axes are exchanged, as in Meta's Llama."""
    rows = x[:, :KV_HEADS].transpose(1, 2)
    batch, length, heads, dim = rows.shape
    times = HEADS // KV_HEADS
    spread = rows[:, :, :, None, :].expand(batch, length, heads, times, dim)
    return spread.reshape(batch, length, heads * times, dim).transpose(1, 2)


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2)
    scores /= 3.0
    scores += distance(q, k)
    scores = scores.masked_fill_(future(q, k), -math.inf)
    return scores.softmax(dim=-1) @ v


def scaled(scores: Tensor) -> Tensor:
    return scores / math.sqrt(DIM)


def soft(scores: Tensor) -> Tensor:
    return torch.softmax(scores, dim=-1)


# name -> function; all of them are one scaled_dot_product_attention
FUSED: dict[str, Forward] = {
    "no scale": lambda q, k, v: soft(q @ k.mT) @ v,
    "scaled q": lambda q, k, v: soft((q * 0.25) @ k.transpose(2, 3)) @ v,
    "divided": lambda q, k, v: F.softmax(scaled(torch.matmul(q, k.transpose(-2, -1))), -1) @ v,
    "scale of a tensor": lambda q, k, v: soft((q @ k.mT) / torch.sqrt(torch.tensor(8.0))) @ v,
    "scale of each head": lambda q, k, v: soft((q @ k.mT) * q[:1, :, :1, :1].abs()) @ v,
    "permuted": lambda q, k, v: soft(q.matmul(k.permute(0, 1, 3, 2))).matmul(v),
    "keys stored transposed": lambda q, k, v: soft(q @ (k.transpose(2, 3).contiguous() * 2)) @ v,
    "masked_fill -inf": lambda q, k, v: soft((q @ k.mT).masked_fill(future(q, k), -math.inf)) @ v,
    "masked_fill finite": lambda q, k, v: soft((q @ k.mT).masked_fill(future(q, k), -1e9)) @ v,
    "nothing is seen": lambda q, k, v: soft((q @ k.mT).masked_fill(q.isfinite().all(), -1e9)) @ v,
    "where": lambda q, k, v: (
        soft(torch.where(~future(q, k), q @ k.mT, torch.finfo(q.dtype).min)) @ v
    ),
    "where with a tensor": lambda q, k, v: (
        soft(torch.where(future(q, k), torch.full([], -1e9, dtype=q.dtype), q @ k.mT)) @ v
    ),
    "added": lambda q, k, v: soft(q @ k.mT / 3 + distance(q, k)) @ v,
    "subtracted": lambda q, k, v: soft(q @ k.mT - distance(q, k)) @ v,
    "mask on the left": lambda q, k, v: soft(distance(q, k)[None] + q @ k.mT) @ v,
    "two biases": lambda q, k, v: soft(q @ k.mT + distance(q, k) + distance(q, k) ** 2) @ v,
    "bias, then -inf": lambda q, k, v: (
        soft((q @ k.mT + distance(q, k)).masked_fill(future(q, k), -math.inf)) @ v
    ),
    "finite, bias, scale": lambda q, k, v: (
        soft(((q @ k.mT).masked_fill(future(q, k), -1e9) + distance(q, k)) * 0.5) @ v
    ),
    "two masks": lambda q, k, v: (
        soft(
            (q @ k.mT)
            .masked_fill(future(q, k), -math.inf)
            .masked_fill(torch.arange(k.shape[-2]) == 2, -math.inf)
        )
        @ v
    ),
    "in place": in_place,
    "softmax of float32": lambda q, k, v: soft((q @ k.mT).float()).to(q.dtype) @ v,
    "inactive dropout": lambda q, k, v: F.dropout(soft(q @ k.mT), 0.1, False) @ v,
    "dropout of nothing": lambda q, k, v: F.dropout(soft(q @ k.mT), 0.0, True) @ v,
    "viewed": lambda q, k, v: (soft(q @ k.mT) @ v).view(q.shape[0] * HEADS, -1, DIM),
    "merged": lambda q, k, v: (soft(q @ k.mT) @ v).transpose(1, 2).reshape(q.shape[0], -1, 32),
    "repeated heads": lambda q, k, v: soft(q @ grouped(k).mT) @ grouped(v),
    "repeated late": lambda q, k, v: soft(q @ late(k).transpose(2, 3)) @ late(v),
    "repeat_interleave": lambda q, k, v: (
        soft(q @ k[:, :2].repeat_interleave(2, dim=1).mT)
        @ torch.repeat_interleave(v[:, :2], 2, dim=1)
    ),
    "one head for all": lambda q, k, v: soft(q @ k[:, :1].mT) @ v[:, :1],
}
GROUPED = ("repeated heads", "repeated late", "repeat_interleave", "one head for all")

# name -> (function, what the reason says)
DECLINED: dict[str, tuple[Forward, str]] = {
    "returned": (lambda q, k, v: (lambda w: (w @ v, w))(soft(q @ k.mT)), "weights are returned"),
    "used twice": (lambda q, k, v: (lambda w: w @ v + w @ k)(soft(q @ k.mT)), "weights are"),
    "scores returned": (lambda q, k, v: (lambda s: (soft(s) @ v, s))(q @ k.mT), "scores are used"),
    "dropout": (lambda q, k, v: F.dropout(soft(q @ k.mT), 0.5, True) @ v, "dropout is on"),
    "other axis": (lambda q, k, v: torch.softmax(q @ k.mT, dim=-2) @ v, "another axis"),
    "head mask": (lambda q, k, v: (soft(q @ k.mT) * q[:1, :, :1, :1]) @ v, "head mask"),
    "soft cap": (lambda q, k, v: soft(torch.tanh(q @ k.mT) * 5) @ v, "go through tanh"),
    "three axes": (lambda q, k, v: soft(q[:, 0] @ k[:, 0].mT) @ v[:, 0], r"\[batch, heads"),
    "negative scale": (lambda q, k, v: soft((q @ k.mT) * -1.0) @ v, "no scale"),
    "scaled by key": (lambda q, k, v: soft((q @ k.mT) * k[..., 0][:, :, None]) @ v, "over keys"),
    "mask that does not hide": (
        lambda q, k, v: soft((q @ k.mT).masked_fill(future(q, k), -5.0)) @ v,
        "does not hide",
    ),
    "alpha": (lambda q, k, v: soft(torch.add(q @ k.mT, distance(q, k), alpha=2)) @ v, "factor"),
    "values on the left": (lambda q, k, v: v.mT @ soft(q @ k.mT), "right operand"),
    "low precision": (lambda q, k, v: soft((q @ k.mT).half()).to(q.dtype) @ v, "precision"),
    "changed in between": (
        lambda q, k, v: (lambda s: (k.add_(1), soft(s) @ v))(q @ k.mT),
        "changed in place",
    ),
}


@dataclass
class Compiled:
    """A model behind torch.compile that runs its graphs after `passes`; one context each."""

    model: nn.Module
    passes: tuple[Pass, ...]
    dynamic: bool | None = None
    contexts: list[PassContext] = field(default_factory=list)
    counts: list[dict[str, int]] = field(default_factory=list)
    found: list[list[AttentionSite | Decline]] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch._dynamo.reset()
        self.call = torch.compile(self.model, backend=self._backend, dynamic=self.dynamic)

    def _backend(self, gm: fx.GraphModule, inputs: list[Tensor]) -> fx.GraphModule:
        bound, ctx = bind(gm, inputs), PassContext()
        self.counts.append(run(bound.gm, self.passes, ctx))
        self.found.append([found for _, found in sites(bound.gm)])
        self.contexts.append(ctx)
        return unbind(bound)
