"""masked -> masked:  skip_softmax_attention(q, ..)  =>  kernel(q, .., dense_below, calibrated, h)

or, where no kernel of the target accepts the node and wins:  =>  dense attention

"Wins" is the guard's word, and here a length: with fewer than `dense_below` keys the kernel's own
operator runs dense attention, decided at each call, so that one graph serves every length.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.node import Argument

from sparsefx import dump
from sparsefx.attention.guard import AttentionVerdict
from sparsefx.attention.operators import ATTENTION_OPS, SKIP_SOFTMAX
from sparsefx.errors import KernelBuildFailed
from sparsefx.passes.grouped_heads import for_dense
from sparsefx.pipeline import PassContext
from sparsefx.rewrite import Site, arguments, erase, tensor_of
from sparsefx.shapes import always_one, hint, varies
from sparsefx.target import AttentionKernel, AttentionLowering, AttentionSpec, Target

aten = torch.ops.aten

AttentionJudge = Callable[[AttentionSpec, AttentionLowering], AttentionVerdict]
"""Compares a built kernel with dense attention."""

UNKNOWN_SPARSITY = (
    "how much it skips is unknown, so nothing shows that it would be faster: pass calibration="
)


@dataclass(frozen=True)
class LowerAttention:
    """Gives each sparse attention to the target's first kernel that accepts it and wins."""

    target: Target
    judge: AttentionJudge = field(compare=False)
    proof: bool = True
    """Whether a kernel must win; False is guard="off"."""
    name: str = "lower_attention"
    stage: str = "folded"

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> int:
        """Returns how many nodes were given to a kernel."""
        nodes = [node for node in gm.graph.nodes if node.target in ATTENTION_OPS]
        return sum(_lower(self, SparseAttention(gm, node, ctx)) for node in nodes)


@dataclass(frozen=True)
class SparseAttention:
    """A sparse attention of a graph, read."""

    gm: fx.GraphModule
    node: fx.Node
    ctx: PassContext

    @property
    def values(self) -> dict[str, object]:
        """Its arguments by name."""
        assert isinstance(self.node.target, OpOverload)
        names = [argument.name for argument in self.node.target._schema.arguments]
        return dict(zip(names, arguments(self.node), strict=True))

    @property
    def method(self) -> str:
        """Which of them: "skip_softmax", "theta" or "block"."""
        assert isinstance(self.node.target, OpOverload)
        name = str(self.node.target._schema.name)
        return name.removeprefix("sparsefx::").removesuffix("_attention")

    def spec(self) -> AttentionSpec:
        """What kernels may know of it."""
        values = self.values
        q, k = tensor_of(values["q"]), tensor_of(values["k"])
        sizes = (q.shape[0], q.shape[2], k.shape[2])
        is_skip = self.node.target is SKIP_SOFTMAX
        options = ("topk", "placement", "denominator", "v_mean")
        tile = (values.get("block_q", 0), values.get("block_k", 0))
        return AttentionSpec(
            method=self.method,
            phase="decode" if always_one(sizes[1]) else "prefill",
            heads=hint(q.shape[1]),
            kv_heads=hint(k.shape[1]),
            head_dim=hint(q.shape[3]),
            dtype=q.dtype,
            mask=_mask_kind(values["mask"]),
            is_causal=bool(values["is_causal"]),
            window=int(values["window"]),  # type: ignore[call-overload]
            tile=tile,  # type: ignore[arg-type]  # the schema says that they are ints
            order=str(values["order"]) if is_skip else "",
            options=tuple(str(values[name]) for name in options if name in values),
            batch=hint(sizes[0]),
            queries=hint(sizes[1]),
            keys=hint(sizes[2]),
            vary=any(varies(size) for size in sizes[1:]),
            sparsity=self.ctx.row(self.node).skipped,
        )


def _lower(options: LowerAttention, found: SparseAttention) -> int:
    spec = found.spec()
    reasons: list[str] = []
    for kernel in options.target.attention:
        if kernel.method != spec.method:
            continue
        refusal = kernel.accepts(spec)
        if refusal:
            reasons.append(f"{kernel.name}: {refusal}")
            continue
        try:
            if _try(options, found, spec, kernel, reasons):
                return 1
        except (KernelBuildFailed, OSError) as error:  # OSError: no place to keep the kernel
            reasons.append(f"{kernel.name}: {error}")
    nothing = f"target {options.target.name} has no kernel for {spec.method} attention"
    found.ctx.decline(found.node, "; ".join(reasons) or nothing)
    _replace(found, dense_form(found))
    return 0


def _try(
    options: LowerAttention,
    found: SparseAttention,
    spec: AttentionSpec,
    kernel: AttentionKernel,
    reasons: list[str],
) -> bool:
    if options.proof and spec.sparsity is None:
        reasons.append(UNKNOWN_SPARSITY)
        return False
    lowering = kernel.lower(spec)
    from_keys = 0
    if spec.sparsity is not None:
        verdict = options.judge(spec, lowering)
        _note_times(found, verdict)
        if verdict.fault or (options.proof and not verdict.wins):
            reasons.append(f"{kernel.name}: {verdict.reason}")
            return False
        from_keys = (verdict.from_keys or 0) if options.proof else 0
    below = from_keys if spec.vary else 0
    unmeasured = "" if spec.sparsity is not None else 'guard="off": taken without times'
    found.ctx.update(found.node, kernel=kernel.name, crossover=below, reason=unmeasured)
    dump.kernel(Path(lowering.path), lowering.text)
    _replace(found, _kernel_call(found, lowering, below))
    return True


def _note_times(found: SparseAttention, verdict: AttentionVerdict) -> None:
    """The times are those of one group of heads at the last length of the ladder."""
    if verdict.keys:
        found.ctx.update(
            found.node,
            dense_us=verdict.dense_us,
            sparse_us=verdict.sparse_us,
            how=verdict.how,
        )


def _kernel_call(found: SparseAttention, lowering: AttentionLowering, below: int) -> fx.Node:
    calibrated = int(found.node.meta.get("sparsefx_calibrated_keys", 0))
    site = Site(found.gm, found.node, "lower_attention")
    return site.call(lowering.op, *arguments(found.node), below, calibrated, lowering.handle)


def dense_form(found: SparseAttention) -> fx.Node:
    """The node as dense attention. The passes never make one with a window of its own."""
    values = found.values
    site = Site(found.gm, found.node, "lower_attention")
    q, k, v = (cast(fx.Node, values[name]) for name in ("q", "k", "v"))
    mask, is_causal = cast(tuple[Argument, bool], (values["mask"], values["is_causal"]))
    k, v, grouped = for_dense(site, q, k, v, mask is not None)
    node = site.call(aten.scaled_dot_product_attention.default, q, k, v, mask, 0.0, is_causal)
    node.kwargs = {"scale": cast(float, values["scale"]), "enable_gqa": grouped}
    return node


def _mask_kind(mask: object) -> str:
    if not isinstance(mask, fx.Node):
        return "none"
    return "bool" if tensor_of(mask).dtype == torch.bool else "float"


def _replace(found: SparseAttention, replacement: fx.Node) -> None:
    found.node.replace_all_uses_with(replacement)
    erase(found.gm, found.node)
