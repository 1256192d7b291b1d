"""Random sparse attentions for the C++ kernels, and their meaning in float64.

Operands are drawn again until no decision is so close that float32 may take it the other way.
"""

import zlib
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from sparsefx.attention import meaning
from sparsefx.attention.operators import attention_output
from sparsefx.codegen.cpp import isa
from sparsefx.codegen.cpp.attention.call import run_counted
from sparsefx.codegen.cpp.attention.kernels import CppAttention
from sparsefx.target import AttentionLowering, AttentionSpec

ISAS = [each.name for each in isa.ISAS if each.present()]
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
CLOSE = 1e-5
Operands = tuple[object, ...]

# (queries, keys): decode, one tile, odd sizes, chunked prefill, rows before the first key
LENGTHS = [(1, 1), (1, 300), (1, 1500), (5, 5), (70, 333), (200, 200), (130, 64)]
SEEN = [(True, 0), (False, 0), (True, 40), (False, 25)]  # is_causal, window


@dataclass(frozen=True)
class Case:
    """What a kernel is generated from; `run` and `check` take the rest."""

    method: str
    isa: str | None = None
    dtype: torch.dtype = torch.float32
    mask: str = "none"
    dim: int = 40
    tile: tuple[int, int] = (64, 64)
    order: str = "sink_diagonal"
    heads: int = 6
    kv_heads: int = 2

    def spec(self) -> AttentionSpec:
        tile = (0, 0) if self.method == "theta" else self.tile
        return AttentionSpec(
            self.method, "prefill", self.heads, self.kv_heads, self.dim, self.dtype, self.mask,
            True, 0, tile, self.order if self.method == "skip_softmax" else "", (), 1, 64, 64,
            vary=True, sparsity=None,
        )  # fmt: skip

    def lower(self) -> AttentionLowering:
        kernel = CppAttention(self.method, self.isa)
        assert kernel.accepts(self.spec()) is None, self
        return kernel.lower(self.spec())

    def arguments(self, queries: int, keys: int, is_causal: bool, window: int) -> Operands:
        """Operands of the dialect operator, decided the same way in float32 and float64."""
        name = f"{self} {queries} {keys} {is_causal} {window}"
        for attempt in count():
            random = torch.Generator().manual_seed(zlib.crc32(f"{name} {attempt}".encode()))
            given = self._arguments(random, queries, keys, is_causal, window)
            if self._margin(given) > CLOSE:
                return given
        raise AssertionError  # count() has no end

    def _arguments(
        self, random: torch.Generator, queries: int, keys: int, is_causal: bool, window: int
    ) -> Operands:
        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random)

        q, k = draw(2, queries, self.heads, self.dim), draw(2, self.kv_heads, keys, self.dim)
        v = draw(2, self.kv_heads, keys, self.dim)
        tiles = -(-keys // self.tile[1])
        # Tiles lie at random depths along one direction of the queries.
        depth = torch.rand(2, self.kv_heads, tiles, generator=random) * 12
        k[..., 0] -= depth.repeat_interleave(self.tile[1], -1)[..., :keys]
        q[..., 0] += self.dim**0.5
        operands = [x.to(self.dtype) for x in (q.transpose(1, 2), k, v)]
        seen = (is_causal, self.dim**-0.5, window)
        return (
            *operands,
            self.drawn_mask(random, queries, keys),
            *self._method(random, seen, q, k),
        )

    def drawn_mask(self, random: torch.Generator, queries: int, keys: int) -> Tensor | None:
        """None, or a mask [2, 1 or heads, queries, keys] that also pads one sequence."""
        if self.mask == "none":
            return None
        # Padding of one sequence, and elements at random in the other.
        keep = torch.rand(2, 1, queries, keys, generator=random) < 0.8
        keep[1] = torch.arange(keys) >= keys // 3
        if self.mask == "bool":
            return keep
        bias = torch.randn(1, self.heads, queries, keys, generator=random)
        return bias.masked_fill(~keep, float("-inf")).to(self.dtype)

    def _method(
        self, random: torch.Generator, seen: tuple[bool, float, int], q: Tensor, k: Tensor
    ) -> Operands:
        queries, keys = q.shape[1], k.shape[2]
        rows, tiles = -(-queries // self.tile[0]), -(-keys // self.tile[1])
        if self.method == "block":
            keep = torch.rand(2, self.heads, rows, tiles, generator=random) < 0.5
            return (keep, *seen, *self.tile)
        # lambda of each head: nothing skipped, some, all below the running maximum
        lambdas = torch.tensor([0.0, 1e-4, 1e-3, 1e-2, 0.3, 2.0])[: self.heads]
        return (lambdas * keys, lambdas.flip(0) * keys, *seen, *self.tile, self.order)

    def _margin(self, given: Operands) -> float:
        """How far the closest decision is from the other one."""
        if self.method != "skip_softmax":
            return 1.0
        s = self.scores(given)
        maxima = meaning.tile_maxima(s, self.tile[1])
        depth = maxima - meaning.running_maxima(maxima, self.order)
        limit = meaning.log_lambda(self.factor(given).double(), s.shape[-1]).view(-1, 1, 1)
        close = (depth - limit).abs()[(depth != 0) & depth.isfinite() & limit.isfinite()]
        return float(close.min()) if close.numel() else 1.0

    def meaning(self, given: Operands) -> Tensor:
        """The definition, in float64."""
        result = getattr(meaning, f"{self.method}_attention")(*widened(given))
        assert isinstance(result, Tensor)
        return result

    def scores(self, given: Operands) -> Tensor:
        q, k, _, mask, *rest = widened(given)
        seen = rest[1:4] if self.method == "block" else rest[2:5]
        return meaning.scores(q, k, mask, *seen)

    def factor(self, given: Operands) -> Tensor:
        factor = given[5] if given[0].shape[2] == 1 else given[4]
        assert isinstance(factor, Tensor)
        return factor

    def check(self, queries: int, keys: int, is_causal: bool, window: int) -> None:
        """The kernel against the meaning, and its count against the tiles that should be kept."""
        self.check_given(self.arguments(queries, keys, is_causal, window))

    def check_given(self, given: Operands) -> None:
        low = self.lower()
        got, counted = run_counted(low.op, *given, 0, 0, low.handle)
        want = self.meaning(given)
        label = f"{self} {[tuple(x.shape) for x in given[:3]]}"
        assert got.dtype == self.dtype and got.stride() == attention_output(*given[:3]).stride(), (
            label
        )
        bound = ROUNDING[self.dtype] * max(float(want.abs().max()), 1.0)
        error = float((got.double() - want).abs().max())
        assert error <= bound, f"{label}: {error:.2e} > {bound:.2e}"
        assert torch.equal(counted, self.kept(given).sum(-1).int()), label

    def kept(self, given: Operands) -> Tensor:
        """The tiles to be computed, [batch, heads, row tiles, key tiles]."""
        s = self.scores(given)
        if self.method == "skip_softmax":
            factor = self.factor(given)
            return meaning.kept_tiles(s, self.kv_heads, factor, *self.tile, self.order)
        free = torch.zeros(self.heads, dtype=torch.float64)  # lambda 0: every tile with a key
        grown = torch.cat((s, s.new_full((*s.shape[:2], 1, s.shape[3]), float("-inf"))), 2)
        visible = meaning.kept_tiles(grown, self.kv_heads, free, *self.tile, "ascending")
        keep = given[4]
        assert isinstance(keep, Tensor)
        return visible[:, :, : keep.shape[2]] & keep


def widened(given: Operands) -> Operands:
    """q, k, v and a float mask in float64."""
    wide = (x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given[:4])
    return (*wide, *given[4:])


def strided(x: Tensor) -> Tensor:
    """The same numbers with strides that no layout of a model has; the last is 1."""
    room = x.new_full((x.shape[1], x.shape[2] + 1, x.shape[0] + 1, x.shape[3] + 3), float("nan"))
    view = room.permute(2, 0, 1, 3)[: x.shape[0], :, : x.shape[2], : x.shape[3]]
    return view.copy_(x)


def replaced(given: Operands, index: int, value: object) -> Operands:
    """The operands with one of them changed."""
    return (*given[:index], value, *given[index + 1 :])
