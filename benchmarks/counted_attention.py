"""A pass that runs sparse attentions by the CPU kernels, at any length, and counts their tiles."""

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from sparsefx.attention.operators import ATTENTION_OPS, SKIP_SOFTMAX
from sparsefx.attention.wanted import Wanted
from sparsefx.calibrate.door import Function, through_passes
from sparsefx.codegen.cpp.attention.call import run_counted
from sparsefx.codegen.cpp.attention.kernels import CppAttention
from sparsefx.passes.detect import Detect
from sparsefx.passes.lower_attention import SparseAttention
from sparsefx.passes.threshold_softmax import ThresholdSoftmax
from sparsefx.pipeline import PassContext
from sparsefx.target import AttentionLowering


class CountedAttention:
    """Replaces the dialect's attentions by kernels that always run, and adds up what they did."""

    name = "count_tiles"
    stage = "masked"

    def __init__(self) -> None:
        self.visible = self.computed = 0
        self._seen: dict[tuple[object, ...], int] = {}

    @property
    def skipped(self) -> float:
        """Share of visible tiles not computed so far; 0 if none were seen."""
        return 1 - self.computed / self.visible if self.visible else 0.0

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> int:
        """Replaces the operators of the graph; returns how many."""
        found = [node for node in gm.graph.nodes if node.target in ATTENTION_OPS]
        for node in found:
            spec = SparseAttention(gm, node, ctx).spec()
            kernel = CppAttention(spec.method).lower(spec)
            node.target = self._counting(kernel, node.target is SKIP_SOFTMAX)
        return len(found)

    def _counting(self, kernel: AttentionLowering, has_tiles: bool) -> Callable[..., Tensor]:
        def run(*operands: object) -> Tensor:
            result, count = run_counted(kernel.op, *operands, 0, 0, kernel.handle)
            if has_tiles:
                self.computed += int(count.sum())
                self.visible += self._visible(kernel, operands)
            return result

        return run

    def _visible(self, kernel: AttentionLowering, operands: tuple[object, ...]) -> int:
        """Tiles that thresholds of zero compute: all that are not masked."""
        q, k, v, mask, prefill, decode, *others = operands
        assert all(isinstance(each, Tensor) for each in (q, k, prefill, decode))
        key = (q.shape, k.shape, *others)  # type: ignore[attr-defined]  # tensors, see above
        if mask is not None or key not in self._seen:
            nothing = (torch.zeros_like(prefill), torch.zeros_like(decode))  # type: ignore[call-overload]
            whole = (q, k, v, mask, *nothing, *others, 0, 0, kernel.handle)
            self._seen[key] = int(run_counted(kernel.op, *whole)[1].sum())
        return self._seen[key]


def counted(model: nn.Module, wanted: Wanted) -> tuple[Function, CountedAttention]:
    """The model's call with `wanted` at work by the CPU kernels, no guard, and what they count."""
    tiles = CountedAttention()
    passes = (Detect(attention=True), ThresholdSoftmax(wanted), tiles)
    return through_passes(model, passes), tiles
