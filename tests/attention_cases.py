"""Inputs of sparse attention for tests: a sink, distance decay, and the masks that models bring."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """Sizes of an attention; `queries` = 1 is decode."""

    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    queries: int = 100
    keys: int = 130
    dim: int = 16


def skipping_inputs(
    sizes: Sizes, seed: int, dtype: torch.dtype = torch.float64, strength: float = 6.0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v whose scores have a sink at key 0 and decay with distance, so that tiles are skipped.

    Scores of random Gaussians never skip. Here two directions carry cos and sin of a slow phase of
    the position (near keys score high) and one carries the sink; the rest is noise.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(heads: int, length: int) -> Tensor:
        shape = (sizes.batch, heads, length, sizes.dim)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q = 0.5 * random(sizes.heads, sizes.queries)
    k, v = 0.5 * random(sizes.kv_heads, sizes.keys), random(sizes.kv_heads, sizes.keys)
    place = torch.arange(sizes.keys, dtype=torch.float64)
    phase = torch.stack((place.div(sizes.keys).mul(3).cos(), place.div(sizes.keys).mul(3).sin()), 1)
    k[..., :2] = phase * strength
    q[..., :2] = phase[sizes.keys - sizes.queries :] * strength if sizes.queries > 1 else phase[-1:]
    q[..., 2] = strength
    k[..., 2] = 0.0
    k[..., 0, 2] = strength
    return q.to(dtype), k.to(dtype), v.to(dtype)


def masks(sizes: Sizes, seed: int) -> dict[str, Tensor | None]:
    """Name -> mask: none, padding on the right (bool), and a float bias that also hides keys."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(sizes.keys // 2, sizes.keys + 1, (sizes.batch,), generator=generator)
    padding = torch.arange(sizes.keys) < lengths[:, None]
    bias = torch.randn(1, sizes.heads, sizes.queries, sizes.keys, generator=generator)
    hidden = torch.rand(sizes.queries, sizes.keys, generator=generator) < 0.2
    hidden[:, 0] = False  # rows without a sink keep every tile in ascending order
    return {
        "none": None,
        "bool": padding[:, None, None, :],
        "float": bias.double().masked_fill(hidden, float("-inf")),
    }
