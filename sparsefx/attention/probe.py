"""Inputs on which a sparse attention skips a chosen share, for timing and for checks.

Random Gaussian scores never skip, so they would time another kernel than the one that runs. Here
one direction of the head space carries a key's fate: q has 1 along it and k has 0 where it stays or
-`DEPTH` (in units of the score) where it goes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

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


def probe(
    spec: AttentionSpec,
    keys: int,
    sparsity: float,
    device: torch.device,
    *,
    batch: int = 1,
    groups: int = 1,
) -> Probe:
    """Inputs with `keys` keys and `groups` KV heads.

    There is one query in decode; in prefill as many as keys, or as a graph of fixed sizes has.

    Of the visible tiles (theta: elements) `sparsity` are skipped, or a little less: the first key
    tile stays always. Heads and batches are independent, so one group stands for all.
    """
    generator = torch.Generator(device).manual_seed(_SEED)
    heads = groups * (spec.heads // spec.kv_heads)
    queries = 1 if spec.phase == "decode" else keys if spec.vary else spec.queries
    scale = spec.head_dim**-0.5

    def random(heads: int, length: int) -> Tensor:
        shape = (batch, length, heads, spec.head_dim)
        dtype = spec.dtype
        return torch.randn(shape, generator=generator, device=device, dtype=dtype).transpose(1, 2)

    q, k, v = random(heads, queries), random(groups, keys), random(groups, keys)
    width = spec.tile[1] or 1
    goes = _going(-(-keys // width), sparsity, spec.phase == "prefill" and spec.is_causal)
    goes = goes.to(device)
    q[..., 0] = 1 / scale
    k[..., 0] = torch.where(goes.repeat_interleave(width)[:keys], -DEPTH, 0.0)
    mask = _mask(spec, queries, keys, device)
    method, options = _method(spec, heads, queries, keys, goes)
    seen = (spec.is_causal, scale, spec.window)
    return Probe(q, k, v, mask, method, seen, options)


def _going(tiles: int, sparsity: float, is_causal: bool) -> Tensor:
    """Bool [tiles], the key tiles that are skipped: drawn at random, up to the asked share.

    Under a causal mask a key tile counts as often as query tiles see it.
    """
    weight = torch.arange(tiles, 0, -1) if is_causal else torch.ones(tiles, dtype=torch.int64)
    order = 1 + torch.randperm(tiles - 1, generator=torch.Generator().manual_seed(_SEED))
    gone = weight[order].cumsum(0) <= sparsity * float(weight.sum()) + 1e-6
    goes = torch.zeros(tiles, dtype=torch.bool)
    goes[order[gone]] = True
    return goes


def _mask(spec: AttentionSpec, queries: int, keys: int, device: torch.device) -> Tensor | None:
    """A causal mask, the one that models bring."""
    if spec.mask == "none":
        return None
    every = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
    visible = every.tril(keys - queries)
    if spec.mask == "bool":
        return visible
    return torch.zeros_like(visible, dtype=spec.dtype).masked_fill(~visible, float("-inf"))


def _method(
    spec: AttentionSpec, heads: int, queries: int, keys: int, goes: Tensor
) -> tuple[tuple[object, ...], tuple[object, ...]]:
    if spec.method == "skip_softmax":
        factor = torch.full((heads,), keys * 2.718281828**-_LIMIT, device=goes.device)
        return (factor, factor), (*spec.tile, spec.order)
    if spec.method == "block":
        rows = -(-queries // spec.tile[0])
        keep = (~goes).expand(1, heads, rows, -1).contiguous()
        return (keep,), spec.tile
    topk, placement, denominator, v_mean = spec.options
    # Scores of what stays are around 0, their probabilities above e^-15 / keys.
    limit = -_LIMIT if placement == "pre" else 2.718281828**-_LIMIT / keys
    table = torch.full((heads, 1), limit, device=goes.device)
    lost = torch.zeros_like(table) if denominator == "offline" else None
    settings = (int(topk), placement, denominator, v_mean == "True")
    return (torch.tensor([keys], device=goes.device), table, lost), settings
