"""A pass that runs sparse attentions by the CPU kernels, at any length, and counts their tiles."""

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from sparsefx.attention.operators import ATTENTION_OPS, SKIP_SOFTMAX
from sparsefx.codegen.cpp.attention.call import run_counted
from sparsefx.codegen.cpp.attention.kernels import CppAttention
from sparsefx.pipeline import PassContext
from sparsefx.target import AttentionLowering, AttentionSpec


class CountedAttention:
    """Replaces the dialect's attentions by kernels that always run, and adds up what they did."""

    name = "count_tiles"
    stage = "masked"

    def __init__(self) -> None:
        self.visible = self.computed = 0
        self._lowered: dict[tuple[object, ...], AttentionLowering] = {}
        self._seen: dict[tuple[object, ...], int] = {}

    @property
    def skipped(self) -> float:
        """Share of visible tiles not computed so far; 0 if none were seen."""
        return 1 - self.computed / self.visible if self.visible else 0.0

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> int:
        """Replaces the operators of the graph; returns how many."""
        found = [node for node in gm.graph.nodes if node.target in ATTENTION_OPS]
        for node in found:
            node.args = (node.target, *node.args)
            node.target = self.run
        return len(found)

    def run(self, op: OpOverload, q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
        """The result of `op` on one call."""
        lowering = self._kernel(op, q, k, rest)
        tail = (0, 0, lowering.handle)
        result, count = run_counted(lowering.op, q, k, v, *rest, *tail)
        if op is SKIP_SOFTMAX:
            self.computed += int(count.sum())
            mask, prefill, decode, *others = rest
            key = (q.shape, k.shape, *others)
            if mask is not None or key not in self._seen:
                nothing = (torch.zeros_like(prefill), torch.zeros_like(decode))  # type: ignore[call-overload]
                whole = run_counted(lowering.op, q, k, v, mask, *nothing, *others, *tail)[1]
                self._seen[key] = int(whole.sum())
            self.visible += self._seen[key]
        return result

    def _kernel(
        self, op: OpOverload, q: Tensor, k: Tensor, rest: tuple[object, ...]
    ) -> AttentionLowering:
        mask = rest[0]
        kind = "none" if not isinstance(mask, Tensor) else "float"
        kind = "bool" if isinstance(mask, Tensor) and mask.dtype == torch.bool else kind
        options = {
            argument.name: value
            for argument, value in zip(op._schema.arguments[3:], rest, strict=True)
        }
        is_theta = "theta" in options
        spec = AttentionSpec(
            method=op._schema.name.removeprefix("sparsefx::").removesuffix("_attention"),
            phase="decode" if q.shape[2] == 1 else "prefill",
            heads=q.shape[1],
            kv_heads=k.shape[1],
            head_dim=q.shape[3],
            dtype=q.dtype,
            mask=kind,
            is_causal=bool(options["is_causal"]),
            window=0,
            tile=(0, 0) if is_theta else (options["block_q"], options["block_k"]),  # type: ignore[arg-type]
            order=str(options.get("order", "")),
            options=tuple(
                str(options[name])
                for name in ("topk", "placement", "denominator", "v_mean")
                if name in options
            ),
            batch=q.shape[0],
            queries=q.shape[2],
            keys=k.shape[2],
            vary=True,
            sparsity=None,
        )
        key = (spec.method, spec.phase, spec.mask, spec.tile, spec.order, spec.options, q.shape[3])
        if key not in self._lowered:
            self._lowered[key] = CppAttention(spec.method).lower(spec)
        return self._lowered[key]
