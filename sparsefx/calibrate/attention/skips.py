"""What each trial factor would skip, lose and change, from one dense pass.

For a row, with x the scores, m the largest, and for key tile j

    L_j = sum_c e^(x_c - m),   U_j = sum_c e^(x_c - m) v_c,   O = sum_j U_j / sum_j L_j,

skipping a set of tiles changes the output by exactly

    O' - O = -sum_skipped (U_j - L_j O) / sum_kept L_j,

a sum over the skipped tiles alone, so that small errors do not drown in rounding. All trials share
L and U; each adds one row to a small matrix product.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from sparsefx.attention.meaning import log_lambda, running_maxima
from sparsefx.attention.spec import SkipSoftmax
from sparsefx.calibrate.attention.tiles import Band, Call
from sparsefx.calibrate.attention.trials import longer

LEAST_TILES = 4
QUERY_TILES = 16
"""Query tiles of a head that are observed in a call."""
_NEVER = float("-inf")
_NOTHING = 1e-17  # of a row's largest weight: lost in rounding, and its square would be subnormal


@dataclass
class Tables:
    """Sums over the data of one phase, float64.

    factors: the trials, ascending. Of each query head and trial [heads, trials]: skipped tiles,
    squared output error, and softmax mass lost. Of each head [heads]: visible tiles, squared norm
    of the output, and rows that see a key. together: how many neighbouring heads decide as one and
    so share a factor: 1 in prefill, the query heads of a KV head in decode.
    """

    together: int
    factors: Tensor
    skipped: Tensor
    error: Tensor
    lost: Tensor
    visible: Tensor
    norm: Tensor
    rows: Tensor

    @classmethod
    def empty(cls, factors: Tensor, heads: int, together: int) -> "Tables":
        """Tables of no data, where `factors` are."""

        def zeros(*size: int) -> Tensor:
            return factors.new_zeros(size, dtype=torch.float64)

        sums = [zeros(heads, factors.numel()) for _ in range(3)] + [zeros(heads) for _ in range(3)]
        return cls(together, factors, *sums)

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.visible.numel()

    def extend(self, factors: Tensor) -> None:
        """Adds trials above the last one, at which lambda was 1 for all data so far."""
        more = factors.numel() - self.factors.numel()
        self.factors = factors
        for name in ("skipped", "error", "lost"):
            table = getattr(self, name)
            last = table[:, -1:] if table.shape[1] else table.new_zeros(table.shape[0], 1)
            setattr(self, name, torch.cat((table, last.expand(-1, more)), 1))

    def move(self, device: torch.device) -> None:
        """To where the data is."""
        for key, tensor in self.tensors().items():
            setattr(self, key, tensor.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, to be stored."""
        return {field.name: getattr(self, field.name) for field in fields(self)[1:]}


@dataclass(frozen=True)
class Parts:
    """A band's softmax by key tile.

    depth [group, rows, tiles]: how far a row's largest score in a tile lies below its running
    maximum (0 or less; -inf where it sees nothing there); sums: L; moves: U - L O as [tiles, group,
    rows, dim]; out: O [group, rows, dim]; total [group, rows].
    """

    depth: Tensor
    sums: Tensor
    moves: Tensor
    out: Tensor
    total: Tensor

    @classmethod
    def of(cls, band: Band, order: str) -> "Parts":
        """Takes the band's scores apart, in place."""
        group, rows, tiles, block = band.scores.shape
        maxima = band.scores.amax(-1)
        depth = maxima - running_maxima(maxima, order)
        depth.masked_fill_(maxima == _NEVER, _NEVER)
        top = maxima.amax(-1, keepdim=True)[..., None]
        weights = band.scores.sub_(top.masked_fill(top == _NEVER, 0)).exp_()
        torch.threshold_(weights, _NOTHING, 0)
        sums = weights.sum(-1)
        total = sums.sum(-1)
        moves = torch.bmm(weights.view(group * rows, tiles, block).transpose(0, 1), band.v)
        out = moves.sum(0) / total.view(-1, 1).clamp(min=torch.finfo(total.dtype).tiny)
        by_tile = sums.view(group * rows, tiles).t()[..., None]
        moves.addcmul_(by_tile, out, value=-1)
        shape = (group, rows, band.v.shape[-1])
        return cls(depth, sums, moves.view(tiles, *shape), out.view(shape), total)


def add_prefill(tables: Tables, band: Band, parts: Parts, keys: int) -> None:
    """Adds a band: its tiles have all its rows of one head, and each head decides for itself."""
    depth = parts.depth.amax(1)
    limit = log_lambda(tables.factors.to(depth.dtype), keys)
    visible = depth != _NEVER
    skip = (visible[:, None] & (depth[:, None] < limit[:, None])).to(depth.dtype)
    first = _first_skip(skip)
    moves = parts.moves.transpose(0, 1).flatten(2)
    error, lost = _effect(skip[:, first:], parts.sums.transpose(1, 2), moves)
    tables.skipped[band.heads] += skip.sum(-1)
    tables.error[band.heads, first:] += error.sum(-1)
    tables.lost[band.heads, first:] += lost.sum(-1)
    tables.visible[band.heads] += visible.sum(-1)
    tables.norm[band.heads] += parts.out.square().sum((1, 2))
    tables.rows[band.heads] += (parts.total > 0).sum(-1)


def add_decode(tables: Tables, band: Band, parts: Parts, row: int) -> None:
    """Adds one row of a band as a decode step: the heads of the group are the rows of its tiles.

    All heads of a group are given the same factor: they skip only together.
    """
    depth = parts.depth[:, row].amax(0)
    limit = log_lambda(tables.factors.to(depth.dtype), int(band.keys[row]))
    visible = depth != _NEVER
    skip = (visible & (depth < limit[:, None])).to(depth.dtype)[None]
    first = _first_skip(skip)
    moves = parts.moves[:, :, row].flatten(1)[None]
    error, lost = _effect(skip[:, first:], parts.sums[:, row].t()[None], moves)
    tables.skipped[band.heads] += skip.sum(-1)
    tables.error[band.heads, first:] += error[0].t()
    tables.lost[band.heads, first:] += lost[0].t()
    tables.visible[band.heads] += visible.sum(-1)
    tables.norm[band.heads] += parts.out[:, row].square().sum(-1)
    tables.rows[band.heads] += (parts.total[:, row] > 0).double()


def _first_skip(skip: Tensor) -> int:
    """The first trial at which a tile is skipped: those before it change nothing."""
    return int((skip.sum((0, 2)) == 0).sum())


def _effect(skip: Tensor, sums: Tensor, moves: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error and lost mass of each row under each trial, [items, trials, rows].

    skip [items, trials, tiles], 1 where skipped; sums [items, tiles, rows]; moves [items, tiles,
    rows * dim].
    """
    lost = skip @ sums
    kept = ((1 - skip) @ sums).clamp(min=torch.finfo(sums.dtype).tiny)
    moved = (skip @ moves).unflatten(-1, (sums.shape[-1], -1))
    return (torch.linalg.vector_norm(moved, dim=-1) / kept).square(), lost / (lost + kept)


def chosen_tiles(call: Call, seed: int) -> list[int]:
    """The query tiles of a call that are observed: one at random of each of 16 equal stretches.

    A sample of all lengths, so that the cost of a call grows with its keys and not their square.
    """
    stretches = min(call.query_tiles, QUERY_TILES)
    generator = torch.Generator().manual_seed(seed)
    places = torch.rand(stretches, generator=generator).tolist()
    ends = [number * call.query_tiles // max(stretches, 1) for number in range(stretches + 1)]
    return [
        start + int(place * (end - start))
        for start, end, place in zip(ends, ends[1:], places, strict=False)
    ]


def decode_rows(call: Call, query_tiles: Sequence[int]) -> list[int]:
    """The queries of a call that stand for decode steps: the last of each tile, if long enough."""
    last = [min((tile + 1) * call.tile[0], call.queries) - 1 for tile in query_tiles]
    shortest = LEAST_TILES * call.tile[1]
    return [row for row in last if row + 1 + call.keys - call.queries >= shortest]


@dataclass
class SkipStatistics:
    """What calibration knows of one skip-softmax attention.

    keys: fewest and most keys of a call.
    """

    tile: tuple[int, int]
    order: str
    prefill: Tables
    decode: Tables
    fixed: bool
    keys: tuple[int, int] = (0, 0)

    @classmethod
    def empty(
        cls, spec: SkipSoftmax, heads: int, kv_heads: int, tile: tuple[int, int]
    ) -> "SkipStatistics":
        """No data yet. Factors that the recipe gives are the only trial."""
        given = spec.factors
        starts = [torch.tensor([factor]) for factor in given] if given else [torch.empty(0)] * 2
        prefill = Tables.empty(starts[0].float(), heads, 1)
        decode = Tables.empty(starts[1].float(), heads, heads // kv_heads)
        return cls(spec.tile or tile, spec.order, prefill, decode, given is not None)

    def add(self, call: Call) -> bool:
        """Adds one call of the attention; False if that gave NaN or infinity."""
        for tables in (self.prefill, self.decode):
            tables.move(call.q.device)
        if not self.fixed:
            self._reach(call.keys)
        seen = self.prefill.rows.sum() + self.decode.rows.sum()  # another sample at each call
        tiles = chosen_tiles(call, int(seen))
        sampled = decode_rows(call, tiles)
        for band in call.bands(tiles):
            parts = Parts.of(band, self.order)
            if call.queries > 1:
                add_prefill(self.prefill, band, parts, call.keys)
            if band.rows[-1] in sampled:
                add_decode(self.decode, band, parts, len(band.rows) - 1)
        fewest, most = self.keys
        self.keys = (min(fewest or call.keys, call.keys), max(most, call.keys))
        return all(bool(each.norm.isfinite().all()) for each in (self.prefill, self.decode))

    def tensors(self) -> dict[str, Tensor]:
        """What `load` takes, by name."""
        phases = {"prefill": self.prefill, "decode": self.decode}
        return {
            f"{phase}.{key}": tensor
            for phase, tables in phases.items()
            for key, tensor in tables.tensors().items()
        }

    def load(self, keys: tuple[int, int], tensors: Mapping[str, Tensor]) -> None:
        """Takes up what `tensors` gave."""
        self.keys = keys
        for phase, tables in (("prefill", self.prefill), ("decode", self.decode)):
            for key in tables.tensors():
                setattr(tables, key, tensors[f"{phase}.{key}"])

    def _reach(self, keys: int) -> None:
        if keys > self.keys[1]:
            for tables in (self.prefill, self.decode):
                tables.extend(longer(tables.factors, keys))
