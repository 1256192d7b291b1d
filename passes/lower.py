"""packed -> lowered:  nm_linear(x, values, index, b, ..)  =>  kernel(x, packed, b, extras, handle)

or, where no kernel of the target accepts the node and wins:  =>  epilogue(linear(x, w, b))

Runs last. "Wins" is the guard's word: measured on this device, modelled by the roofline, or, with
guard="off", taken for granted. Of several that win the fastest is taken. Every node gets its times
or its reason in the report.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, fx

from sparsefx import choice, dump, guard
from sparsefx.ops import PACKED_OPS
from sparsefx.passes.dense_form import dense_form
from sparsefx.passes.packed_node import PackedNode
from sparsefx.pipeline import PassContext
from sparsefx.rewrite import Site, erase
from sparsefx.target import Kernel, LinearSpec, Lowering, Target

Judge = Callable[[LinearSpec, Tensor, Tensor | None, Lowering], guard.Verdict]
"""Compares a built kernel with dense: (spec, dense weight [out, in], bias, lowering) -> verdict."""


@dataclass(frozen=True)
class Lower:
    """Gives each packed node to the fastest of the target's kernels that accept it and win."""

    target: Target
    judge: Judge = field(compare=False)
    proof: bool = True
    """Whether a kernel must win; False is guard="off"."""
    name: str = "lower"
    stage: str = "lowered"

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> int:
        """Returns how many nodes were given to a kernel."""
        packed = [node for node in gm.graph.nodes if node.target in PACKED_OPS]
        return sum(_lower(self, PackedNode(gm, node, ctx)) for node in packed)


def _lower(options: Lower, packed: PackedNode) -> int:
    spec, reasons = packed.spec(), choice.Reasons()
    offers = choice.built(
        choice.configurations(_accepting(options, packed, spec, reasons), spec),
        spec,
        packed.packed,
        reasons,
    )
    weight, bias = packed.dense(), packed.bias_value
    chosen = choice.fastest(
        offers, spec, lambda at, each: options.judge(at, weight, bias, each), options.proof, reasons
    )
    _tell(packed, chosen)
    if chosen.offer is None:
        layout = "N:M" if spec.layout == "nm" else spec.layout
        nothing = f"target {options.target.name} has no {layout} kernel"
        packed.ctx.decline(packed.node, str(reasons) or nothing)
        _replace(packed, dense_form(packed, options.name))
        return 0
    packed.ctx.baked.add(packed.weight[0])
    _replace(packed, _kernel_call(packed, chosen.offer.lowering))
    return 1


def _accepting(
    options: Lower, packed: PackedNode, spec: LinearSpec, reasons: choice.Reasons
) -> list[Kernel]:
    accepting = []
    for kernel in options.target.kernels:
        if kernel.layout == spec.layout:
            refusal = kernel.accepts(spec) or packed.refusal(spec)
            if refusal:
                reasons.add(kernel, refusal)
            else:
                accepting.append(kernel)
    return accepting


def _tell(packed: PackedNode, chosen: choice.Choice) -> None:
    """Fills the node's row; dumps the kernel that was chosen."""
    if chosen.verdict is not None:
        packed.ctx.update(
            packed.node,
            dense_us=chosen.verdict.dense_us,
            sparse_us=chosen.verdict.sparse_us,
            how=chosen.verdict.how,
            error=chosen.verdict.error,
        )
    if chosen.offer is not None:
        lowering = chosen.offer.lowering
        size = sum(tensor.nbytes for tensor in lowering.packed)
        packed.ctx.update(packed.node, kernel=chosen.offer.kernel.name, stored_bytes=size)
        dump.kernel(Path(lowering.path), lowering.text)


def _kernel_call(packed: PackedNode, lowering: Lowering) -> fx.Node:
    site = Site(packed.gm, packed.node, "lower")
    stored = _stored(packed, site, lowering)
    rest = (packed.bias, packed.extras, lowering.handle, lowering.features)
    return site.call(lowering.op, packed.x, stored, *rest)


def _stored(packed: PackedNode, site: Site, lowering: Lowering) -> list[fx.Node]:
    """The nodes of the kernel's tensors: those of the packed node where they are the same."""
    stored: list[fx.Node] = []
    for number, tensor in enumerate(lowering.packed):
        same = [n for n, t in zip(packed.stored, packed.packed, strict=True) if t is tensor]
        name = f"{packed.weight[0]}_{lowering.handle}_{number}".replace("-", "_").replace(":", "_")
        stored.append(same[0] if same else site.constant(name, tensor))
    return stored


def _replace(packed: PackedNode, replacement: fx.Node) -> None:
    packed.node.replace_all_uses_with(replacement)
    erase(packed.gm, packed.node)
