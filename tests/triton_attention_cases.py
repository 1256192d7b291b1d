"""Cases of the attention kernels with many queries, run in the interpreter against the meaning."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsefx.attention import meaning
from sparsefx.codegen.triton.attention import prefill
from sparsefx.codegen.triton.attention.kernels import TritonBlock, TritonSkipPrefill
from sparsefx.target import AttentionSpec
from tests.attention_cases import Sizes, masks, skipping_inputs
from tests.interp_bf16 import repaired
from tests.interp_reduce import fast

DIRECT = prefill.Form(defer=False, flat=False, warps=4, stages=2)
DEFERRED = prefill.Form(defer=True, flat=True, warps=4, stages=2)
# one rounding of P and one of the result, of values up to a few units
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Case:
    """An attention to compute; `sizes` as in attention_cases, `factor` for every head."""

    sizes: Sizes
    tile: tuple[int, int] = (16, 16)
    order: str = "sink_diagonal"
    is_causal: bool = True
    window: int = 0
    mask: str = "none"
    dtype: torch.dtype = torch.float32
    factor: float = 8.0
    seed: int = 5

    def spec(self, method: str) -> AttentionSpec:
        """What the kernels are asked for."""
        sizes = self.sizes
        return AttentionSpec(
            method=method,
            phase="prefill",
            heads=sizes.heads,
            kv_heads=sizes.kv_heads,
            head_dim=sizes.dim,
            dtype=self.dtype,
            mask=self.mask,
            is_causal=self.is_causal,
            window=self.window,
            tile=self.tile,
            order=self.order,
            options=(),
            batch=sizes.batch,
            queries=sizes.queries,
            keys=sizes.keys,
            vary=True,
            sparsity=None,
        )

    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q, k, v and the mask."""
        mask = masks(self.sizes, self.seed)[self.mask]
        if self.mask == "float" and mask is not None:
            mask = mask.float()
        keys = self.sizes.keys
        longest = replace(self.sizes, keys=max(keys, self.sizes.queries))
        q, k, v = skipping_inputs(longest, self.seed, self.dtype)
        return q, k[:, :, :keys], v[:, :, :keys], mask

    def factors(self) -> Tensor:
        """A scale factor for each head, all different."""
        return self.factor * torch.linspace(0.5, 2, self.sizes.heads)

    @property
    def scale(self) -> float:
        """Of the scores."""
        return float(self.sizes.dim**-0.5)

    def skip(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, form: prefill.Form
    ) -> tuple[Tensor, Tensor]:
        """The result of the skip_prefill kernel and how many tiles it computed."""
        kernel = TritonSkipPrefill()
        assert kernel.accepts(self.spec("skip_softmax")) is None
        handle = kernel.lower(self.spec("skip_softmax")).handle
        seen = (self.factors(), self.scale, self.window)
        with repaired(), fast():
            return prefill.computed_tiles(handle, q, k, v, mask, *seen, form)

    def block(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, keep: Tensor) -> Tensor:
        """The result of the block kernel."""
        kernel = TritonBlock()
        assert kernel.accepts(self.spec("block")) is None
        handle = kernel.lower(self.spec("block")).handle
        with repaired(), fast():
            return prefill.block_attention(handle, q, k, v, mask, keep, self.scale, self.window)

    def kept(self, q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
        """Which tiles the rule keeps, in float64."""
        wide = mask.double() if self.mask == "float" and mask is not None else mask
        s = meaning.scores(q.double(), k.double(), wide, self.is_causal, self.scale, self.window)
        return meaning.kept_tiles(s, k.shape[1], self.factors(), *self.tile, self.order)

    def check_skip(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, form: prefill.Form
    ) -> Tensor:
        """Asserts that result and counts are the meaning's, in float64; returns the counts."""
        result, counts = self.skip(q, k, v, mask, form)
        keep = self.kept(q, k, mask)
        assert torch.equal(counts, keep.sum(-1).int()), f"seed {self.seed}: counts {self}"
        self.check(result, q, k, v, mask, keep)
        return counts

    def check(
        self, result: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, keep: Tensor
    ) -> None:
        """Asserts that `result` is attention over the tiles of `keep`, NaN where that is NaN."""
        wide = mask.double() if self.mask == "float" and mask is not None else mask
        seen = (self.is_causal, self.scale, self.window)
        operands = (q.double(), k.double(), v.double(), wide, keep)
        expected = meaning.block_attention(*operands, *seen, *self.tile)
        assert result.dtype == self.dtype
        assert result.transpose(1, 2).is_contiguous()
        torch.testing.assert_close(
            result.double(), expected, rtol=0, atol=TOLERANCE[self.dtype], equal_nan=True
        )
