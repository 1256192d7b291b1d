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
from sparsefx.packing import Packing
from sparsefx.passes.dense_form import dense_form
from sparsefx.passes.packed_node import PackedNode
from sparsefx.pipeline import PassContext
from sparsefx.rewrite import Site, erase
from sparsefx.target import Kernel, LinearSpec, Lowering, Target

Judge = Callable[[LinearSpec, Tensor, Tensor | None, Lowering], guard.Verdict]
"""Compares a built kernel with dense: (spec, dense weight [out, in], bias, lowering) -> verdict."""


@dataclass(frozen=True)
class Lower:
    """Gives each packed node to the fastest of the target's kernels that accept it and win.

    Where none does, the same weight is offered in its other packings, unquantised in the end.
    """

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
    reasons, tried = choice.Reasons(), []
    for packing in (packed.packing, *packed.packing.alternatives()):
        tried.append(_chosen(options, packed, packing, reasons))
        if tried[-1].offer is not None:
            break
    _tell(packed, min(tried, key=_distance))
    offer = tried[-1].offer
    if offer is None:
        layout = {"nm": "N:M"}.get(packed.packing.layout, packed.packing.layout)
        nothing = f"target {options.target.name} has no {layout} kernel"
        packed.ctx.decline(packed.node, str(reasons) or nothing)
        _replace(packed, dense_form(packed, options.name))
        return 0
    packed.ctx.baked.add(packed.weight[0])
    _replace(packed, _kernel_call(packed, offer.lowering))
    return 1


def _distance(chosen: choice.Choice) -> tuple[bool, float]:
    """Smallest for the offer to run; else for the one that came closest to dense."""
    ratio = float("inf") if chosen.verdict is None else chosen.verdict.ratio
    return chosen.offer is None, ratio


def _chosen(
    options: Lower, packed: PackedNode, packing: Packing, reasons: choice.Reasons
) -> choice.Choice:
    """The fastest kernel for the weight as `packing` stores it."""
    kernels = [each for each in options.target.kernels if each.layout == packing.layout]
    if not kernels:
        return choice.Choice(None, None)
    spec = packed.spec(packing)
    offers = choice.built(
        choice.configurations(_accepting(packed, kernels, spec, reasons), spec),
        spec,
        packed.packed_as(packing),
        reasons,
    )
    weight, bias = packed.dense(), packed.bias_value
    return choice.fastest(
        offers, spec, lambda at, each: options.judge(at, weight, bias, each), options.proof, reasons
    )


def _accepting(
    packed: PackedNode, kernels: list[Kernel], spec: LinearSpec, reasons: choice.Reasons
) -> list[Kernel]:
    accepting = []
    for kernel in kernels:
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
