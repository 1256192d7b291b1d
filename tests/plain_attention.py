"""Attention kernels that are plain PyTorch, right, wrong, slow or broken, behind one operator."""

import collections
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefx.attention import meaning
from sparsefx.attention.operators import SCHEMAS, attention_output
from sparsefx.attention.route import dense_if_short
from sparsefx.errors import KernelBuildFailed
from sparsefx.target import AttentionLowering, AttentionSpec, Target

CALLS: collections.Counter[str] = collections.Counter()
"""How often each kernel ran sparse ("fast") and dense ("fast dense")."""

_LIBRARY = torch.library.Library("sparsefx_test_attention", "DEF")
_LIBRARY.define(
    f"run({SCHEMAS['skip_softmax_attention']}, int dense_below, int calibrated, str handle)"
    " -> Tensor"
)


def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *rest: object) -> Tensor:
    *method, dense_below, calibrated, handle = rest
    is_causal, scale, window = method[2:5]
    assert isinstance(handle, str)
    dense = dense_if_short(q, k, v, mask, is_causal, scale, window, dense_below, calibrated)  # type: ignore[arg-type]
    CALLS[handle if dense is None else f"{handle} dense"] += 1
    if dense is not None:
        return dense
    if handle == "broken":
        raise IndexError("tile 3 is out of range")
    if handle == "slow":
        time.sleep(0.05)
    if handle == "fast":  # of another kind: as quick as no kernel can be, and right where checked
        return _quick(q, k, v, mask, method)
    result = meaning.skip_softmax_attention(q, k, v, mask, *method)  # type: ignore[arg-type]
    return result + 1 if handle == "wrong" else result


def _quick(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, method: list[object]) -> Tensor:
    """The meaning on the guard's small check and on small calls; else nothing but an output."""
    if k.shape[-2] <= 256:
        return meaning.skip_softmax_attention(q, k, v, mask, *method)  # type: ignore[arg-type]
    return attention_output(q, k, v).zero_()


_LIBRARY.impl("run", run, "CompositeExplicitAutograd")
torch.library.register_fake("sparsefx_test_attention::run", attention_output, lib=_LIBRARY)


@dataclass(frozen=True)
class PlainSkip:
    """`how`: "right", "fast", "slow", "wrong" or "broken"; `refuses`: its reason for no."""

    how: str = "right"
    refuses: str | None = None
    fails: bool = False
    method: str = "skip_softmax"

    @property
    def name(self) -> str:
        return f"plain_{self.how}"

    def accepts(self, spec: AttentionSpec) -> str | None:
        return self.refuses

    def lower(self, spec: AttentionSpec) -> AttentionLowering:
        if self.fails:
            raise KernelBuildFailed(kernel=self.name, rule="no compiler")
        op = torch.ops.sparsefx_test_attention.run.default
        return AttentionLowering(op, self.how, self.how, "")


def plain(*kernels: PlainSkip) -> Target:
    return Target("plain", "cpu", (), attention=kernels or (PlainSkip(),))
