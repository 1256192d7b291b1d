"""One dense attention cut into bands: a query tile of one KV head's heads, and the keys it sees."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefx.attention.dense import is_visible

_NEVER = float("-inf")


@dataclass(frozen=True)
class Band:
    """The scores of a query tile, for the query heads that share a KV head.

    scores: [group, rows, tiles, block_k], -inf where a row does not see a key; v [tiles, block_k,
    dim], 0 behind the last key; sample: of the batch; heads: the query heads; rows: the queries;
    keys: of each row, how many keys there are up to the last that it sees, int64 [rows]: what a
    cache would hold if the row were a decode step.
    """

    scores: Tensor
    v: Tensor
    sample: int
    heads: slice
    rows: range
    keys: Tensor


@dataclass(frozen=True)
class Call:
    """The operands of one attention and the size of its tiles.

    q [batch, heads, queries, dim]; k, v [batch, kv_heads, keys, dim]; mask bool or float, broadcast
    to [batch, heads, queries, keys]. A float mask hides with -inf, or as models do with (about) the
    smallest float.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    is_causal: bool
    scale: float
    tile: tuple[int, int]

    @property
    def queries(self) -> int:
        """Number of rows."""
        return self.q.shape[-2]

    @property
    def keys(self) -> int:
        """Number of keys."""
        return self.k.shape[-2]

    @property
    def query_tiles(self) -> int:
        """Number of query tiles of a head."""
        return -(-self.queries // self.tile[0])

    def bands(self, query_tiles: Sequence[int] | None = None) -> Iterator[Band]:
        """Every band in which a row sees a key: memory is that of one, whatever the length.

        query_tiles: only these, by number.
        """
        wanted = range(self.query_tiles) if query_tiles is None else query_tiles
        group = self.q.shape[1] // self.k.shape[1]
        for sample in range(self.q.shape[0]):
            for kv_head in range(self.k.shape[1]):
                heads = slice(kv_head * group, (kv_head + 1) * group)
                k = _padded(wide(self.k[sample, kv_head]), self.tile[1])
                v = _padded(wide(self.v[sample, kv_head]), self.tile[1])
                v = v.unflatten(0, (-1, self.tile[1]))
                for number in wanted:
                    start = number * self.tile[0]
                    rows = range(start, min(start + self.tile[0], self.queries))
                    yield from self._band(sample, heads, rows, k, v)

    def _band(self, sample: int, heads: slice, rows: range, k: Tensor, v: Tensor) -> Iterator[Band]:
        hidden, added, width = self._hidden(sample, heads, rows)
        if not width:
            return
        block = self.tile[1]
        tiles = -(-width // block)
        q = wide(self.q[sample, heads, rows.start : rows.stop]) * self.scale
        scores = (q.flatten(0, 1) @ k[: tiles * block].t()).unflatten(0, q.shape[:2])
        if added is not None:
            scores[..., :width] += added
        if hidden is not None:
            scores[..., width - hidden.shape[-1] : width].masked_fill_(hidden, _NEVER)
        scores[..., width:] = _NEVER
        keys = _last_seen(hidden, width, len(rows), q.device)
        yield Band(scores.unflatten(-1, (tiles, block)), v[:tiles], sample, heads, rows, keys)

    def _hidden(
        self, sample: int, heads: slice, rows: range
    ) -> tuple[Tensor | None, Tensor | None, int]:
        """What no row may see (bool, the last columns of the width), what is added to the scores,
        and the width: where the keys that some row sees end."""
        width = self.keys - self.queries + rows.stop if self.is_causal else self.keys
        width = max(width, 0)
        # Without a mask only the diagonal hides, and it lies in as many columns as there are rows.
        tail = width if self.mask is not None else min(width, len(rows))
        visible = is_visible(len(rows), tail, self.is_causal, 0, self.q.device)
        hidden = None if visible is None else ~visible[None]
        if self.mask is None:
            return hidden, None, width
        shape = (*self.q.shape[:3], self.keys)
        mask = self.mask.expand(shape)[sample, heads, rows.start : rows.stop, :width]
        unseen = ~mask if mask.dtype == torch.bool else mask <= torch.finfo(mask.dtype).min / 2
        hidden = unseen if hidden is None else hidden | unseen
        seen = (~hidden).flatten(0, 1).any(0).nonzero()
        width = int(seen[-1]) + 1 if seen.numel() else 0
        added = None if mask.dtype == torch.bool else wide(mask).masked_fill(unseen, 0)
        return hidden[..., :width], None if added is None else added[..., :width], width


def wide(x: Tensor) -> Tensor:
    """As the meaning computes: float32, or float64 if it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def _padded(x: Tensor, block: int) -> Tensor:
    """[keys, dim] -> [tiles * block, dim], zeros behind."""
    return F.pad(x, (0, 0, 0, -x.shape[0] % block))


def _last_seen(hidden: Tensor | None, width: int, rows: int, device: torch.device) -> Tensor:
    if hidden is None:
        return torch.full((rows,), width, device=device)
    count = torch.arange(width - hidden.shape[-1] + 1, width + 1, device=device)
    return (~hidden * count).amax((0, 2))
