"""Inputs on which a sparse attention skips a chosen share, for timing and for checks.

Random Gaussian scores never skip, so they would time another kernel than the one that runs. Here
one direction of the head space carries a key's fate: q has 1 along it and k has 0 where it stays or
-`DEPTH` (in units of the score) where it goes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefx.attention.operators import BLOCK, SKIP_SOFTMAX
from sparsefx.target import AttentionSpec

DEPTH = 30.0  # how far the scores of what goes lie below those of what stays
_LIMIT = 15.0  # -ln(lambda), and the threshold of theta: between the two
_SEED = 0


@dataclass(frozen=True)
class Probe:
    """The arguments of a sparse attention: q, k, v, mask, the method's own and the rest."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    method: tuple[object, ...]
    seen: tuple[bool, float, int]
    options: tuple[object, ...]

    @property
    def arguments(self) -> tuple[object, ...]:
        """As the dialect's operator takes them."""
        return (self.q, self.k, self.v, self.mask, *self.method, *self.seen, *self.options)


def probe(spec: AttentionSpec, keys: int, sparsity: float, device: torch.device) -> Probe:
    """Batch 1, one group of query heads, `keys` keys and as many queries (decode: one).

    About `sparsity` of the key tiles (theta: of the keys) are skipped by every query tile; the
    first stays always. Heads and batches are independent, so one group stands for all.
    """
    generator = torch.Generator("cpu").manual_seed(_SEED)
    group = spec.heads // spec.kv_heads
    queries = 1 if spec.phase == "decode" else keys
    scale = spec.head_dim**-0.5

    def random(heads: int, length: int) -> Tensor:
        shape = (1, length, heads, spec.head_dim)
        return torch.randn(shape, generator=generator).transpose(1, 2)

    q, k, v = random(group, queries), random(1, keys), random(1, keys)
    width = spec.tile[1] or 1
    goes = torch.rand(-(-keys // width), generator=generator) < sparsity
    goes[0] = False
    q[..., 0] = 1 / scale
    k[..., 0] = torch.where(goes.repeat_interleave(width)[:keys], -DEPTH, 0.0)
    mask = _mask(spec, queries, keys)
    method, options = _method(spec, group, queries, keys, goes)
    return Probe(
        *(each.to(device, spec.dtype) for each in (q, k, v)),
        None if mask is None else mask.to(device),
        tuple(each.to(device) if isinstance(each, Tensor) else each for each in method),
        (spec.is_causal, scale, spec.window),
        options,
    )


def _mask(spec: AttentionSpec, queries: int, keys: int) -> Tensor | None:
    """A causal mask, the one that models bring."""
    if spec.mask == "none":
        return None
    visible = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]
    if spec.mask == "bool":
        return visible
    return torch.zeros(visible.shape, dtype=spec.dtype).masked_fill(~visible, float("-inf"))


def _method(
    spec: AttentionSpec, group: int, queries: int, keys: int, goes: Tensor
) -> tuple[tuple[object, ...], tuple[object, ...]]:
    if spec.method == "skip_softmax":
        factor = torch.full((group,), keys * 2.718281828**-_LIMIT)
        return (factor, factor), (*spec.tile, spec.order)
    if spec.method == "block":
        rows = -(-queries // spec.tile[0])
        keep = (~goes).expand(1, group, rows, -1).contiguous()
        return (keep,), spec.tile
    topk, placement, denominator, v_mean = spec.options
    # Scores of what stays are around 0, their probabilities above e^-15 / keys.
    limit = -_LIMIT if placement == "pre" else 2.718281828**-_LIMIT / keys
    table = torch.full((group, 1), limit)
    lost = torch.zeros(group, 1) if denominator == "offline" else None
    settings = (int(topk), placement, denominator, v_mean == "True")
    return (torch.tensor([keys]), table, lost), settings


OPERATORS = {
    "skip_softmax": SKIP_SOFTMAX,
    "theta": torch.ops.sparsefx.theta_attention.default,
    "block": BLOCK,
}
"""Method -> the dialect's operator."""
