"""packed -> lowered:  nm_linear(x, values, index, b, ..)  =>  kernel(x, packed, b, extras, handle)

or, where calls bring different numbers of rows and no kernel wins at all of them:

    => epilogue(by_rows(x, packed, w, b, routes))       each range of rows a kernel, or dense

or, where no kernel of the target accepts the node and wins:  =>  epilogue(linear(x, w, b))

Runs last. "Wins" is the guard's word: measured on this device, modelled by the roofline, or, with
guard="off", taken for granted. Of several that win the fastest is taken. Every node gets its times
or its reason in the report.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor, fx
from tqdm import tqdm

from sparsefx import choice, dump, guard, ladder
from sparsefx.by_rows import NO_COSTS, Costs
from sparsefx.candidates import rows_between, rows_of
from sparsefx.ops import PACKED_OPS
from sparsefx.packing import Packing
from sparsefx.passes.dense_form import dense_form
from sparsefx.passes.kernel_form import by_rows_form, kernel_form
from sparsefx.passes.packed_node import PackedNode
from sparsefx.pipeline import PassContext
from sparsefx.rewrite import erase
from sparsefx.target import Inspect, Kernel, LinearSpec, Lowering, Target, no_objections

Judge = Callable[[LinearSpec, Tensor, Tensor | None, Lowering], guard.Verdict]
"""Compares a built kernel with dense: (spec, dense weight [out, in], bias, lowering) -> verdict."""

Baseline = Callable[[LinearSpec, Tensor], float | None]
"""Microseconds of the best quantised dense product: (spec, dense weight [out, in]); None: none."""


def no_baseline(spec: LinearSpec, weight: Tensor) -> None:
    """Where nothing is measured."""


UNPACKED = "its weight is unpacked for each call (memory='small')"
_STRIDE = 3  # kernels are asked for their tunings at every third rung


@dataclass(frozen=True)
class Lower:
    """Gives each packed node to the fastest of the target's kernels that accept it and win.

    Where none does, the same weight is offered in its other packings, unquantised in the end.
    """

    target: Target
    judge: Judge = field(compare=False)
    proof: bool = True
    """Whether a kernel must win; False is guard="off"."""
    costs: Costs = field(default=NO_COSTS, compare=False)
    baseline: Baseline = field(default=no_baseline, compare=False)
    inspect: Inspect = field(default=no_objections, compare=False)
    name: str = "lower"
    stage: str = "lowered"

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> int:
        """Returns how many nodes were given to a kernel."""
        packed = [node for node in gm.graph.nodes if node.target in PACKED_OPS]
        bar = tqdm(packed, desc="lower", unit="layer", leave=False, delay=1, disable=None)
        return sum(_lower(self, PackedNode(gm, node, ctx)) for node in bar)


@dataclass(frozen=True)
class _Work:
    """One node on its way to a kernel."""

    options: Lower
    packed: PackedNode
    reasons: choice.Reasons

    def kernels(self, packing: Packing) -> list[Kernel]:
        """Those of the target that read its layout."""
        return [each for each in self.options.target.kernels if each.layout == packing.layout]

    def offers(self, packing: Packing, specs: Sequence[LinearSpec]) -> list[choice.Offer]:
        """The kernels that are worth timing, built for the node at one of the specs."""
        kernels = self.kernels(packing)
        for kernel in kernels:
            refusals = [kernel.accepts(spec) or self.packed.refusal(spec) for spec in specs]
            if all(refusals):
                self.reasons.add(kernel, str(refusals[0]))
        if self.packed.refusal(specs[0]):
            return []
        ways = choice.proposed(kernels, specs)
        built = list(choice.built(ways, self.packed.packed_as(packing), self.reasons))
        return choice.worth_timing(built, specs, self.options.inspect, self.reasons)

    def ask(self, spec: LinearSpec, lowering: Lowering) -> guard.Verdict:
        """The judge's verdict on a kernel for this node's weight, against what else would run."""
        weight, bias = self.packed.dense(), self.packed.bias_value
        return self.options.judge(spec, weight, bias, lowering).against(self.unpack_us)

    @functools.cached_property
    def unpack_us(self) -> float:
        """What a dense product takes longer where the weight is unpacked for it."""
        only = self.options.proof and self.packed.is_packed_only
        return self.options.costs.unpack_us(self.packed.unpacked) if only else 0.0

    def fastest(self, packing: Packing) -> choice.Choice:
        """One kernel for every call."""
        spec = self.packed.spec(packing)
        offers = self.offers(packing, [spec])
        return choice.fastest(offers, spec, self.ask, self.options.proof, self.reasons)

    def table(self, packing: Packing) -> ladder.Table:
        """Kernels by rows, without the epilogue, which dense rows leave to Inductor."""
        bare = replace(self.packed.spec(packing), epilogue="")
        rungs = ladder.rungs(*rows_between(self.packed.x), bare.rows)
        offers = self.offers(packing, [replace(bare, rows=rows) for rows in rungs[::_STRIDE]])
        dispatch_us = self.options.costs.dispatch_us()
        return ladder.table(offers, bare, rungs, self.ask, self.reasons, dispatch_us)


def _lower(options: Lower, packed: PackedNode) -> int:
    work = _Work(options, packed, choice.Reasons())
    vary = options.proof and rows_of(packed.x)[1]
    others = () if packed.is_packed_only else packed.packing.alternatives()
    asked: list[guard.Verdict] = []
    built = None
    for packing in (packed.packing, *others):
        if built is None and work.kernels(packing):
            built, verdict = (_by_rows if vary else _for_all_rows)(work, packing)
            if built is not None and packing != packed.packing:
                packed.ctx.update(packed.node, reason=f"{packing} here; {work.reasons}")
            asked = [verdict] if built and verdict else asked + ([verdict] if verdict else [])
    _tell_baseline(work)
    _tell_times(packed, min(asked, key=lambda verdict: verdict.ratio, default=None))
    _replace(packed, built or _otherwise(work))
    return int(built is not None)


def _otherwise(work: _Work) -> fx.Node:
    """Where no kernel runs: the dense product, of a weight unpacked for it if there is no other."""
    packed, name = work.packed, work.options.target.name
    layout = {"nm": "N:M"}.get(packed.packing.layout, packed.packing.layout)
    reason = str(work.reasons) or f"target {name} has no {layout} kernel"
    if not packed.is_packed_only:
        packed.ctx.decline(packed.node, reason)
        return dense_form(packed, work.options.name)
    packed.ctx.decline(packed.node, f"{UNPACKED}; {reason}")
    return by_rows_form(packed, ladder.ALL_DENSE, work.options.name)


_Outcome = tuple[fx.Node | None, guard.Verdict | None]
"""What takes the node's place, and the verdict on it or on what came closest."""


def _for_all_rows(work: _Work, packing: Packing) -> _Outcome:
    chosen = work.fastest(packing)
    if chosen.offer is None:
        return None, chosen.verdict
    _tell_kernels(work, [chosen.offer])
    return kernel_form(work.packed, chosen.offer.lowering, work.options.name), chosen.verdict


def _by_rows(work: _Work, packing: Packing) -> _Outcome:
    table = work.table(packing)
    if table.only is not None:
        whole = work.fastest(packing)  # with the epilogue, at the example's rows
        if whole.offer is not None and whole.offer.kernel == table.only.kernel:
            _tell_kernels(work, [whole.offer])
            return kernel_form(work.packed, whole.offer.lowering, work.options.name), whole.verdict
    if not table.offers:
        return None, table.verdict
    _tell_kernels(work, table.offers)
    otherwise = "unpacked" if work.packed.is_packed_only else "dense"
    work.packed.ctx.update(work.packed.node, by_rows=table.text(otherwise))
    return by_rows_form(work.packed, table, work.options.name), table.verdict


def _tell_baseline(work: _Work) -> None:
    """Beside the times: what a dense product of such values takes. It decides nothing."""
    packed = work.packed
    spec = packed.spec(packed.packing)
    if spec.values and not packed.refusal(spec):
        us = work.options.baseline(spec, packed.dense())
        packed.ctx.update(packed.node, quantised_us=us)


def _tell_times(packed: PackedNode, verdict: guard.Verdict | None) -> None:
    if verdict is not None:
        packed.ctx.update(
            packed.node,
            dense_us=verdict.dense_us,
            sparse_us=verdict.sparse_us,
            how=verdict.how,
            error=verdict.error,
        )


def _tell_kernels(work: _Work, offers: Sequence[choice.Offer]) -> None:
    """Fills the node's row; dumps the kernels that were chosen."""
    packed = work.packed
    names = " + ".join(dict.fromkeys(offer.kernel.name for offer in offers))
    size = _bytes(tensor for offer in offers for tensor in offer.lowering.packed)
    if packed.is_packed_only:
        kept = _bytes((*packed.packed, *(t for each in offers for t in each.lowering.packed)))
    else:
        kept = size + packed.dense().nbytes
    packed.ctx.update(packed.node, kernel=names, stored_bytes=size, kept_bytes=kept)
    packed.ctx.baked.update(packed.sources)
    for offer in offers:
        dump.kernel(Path(offer.lowering.path), offer.lowering.text)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of distinct tensors: kernels may share some."""
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


def _replace(packed: PackedNode, replacement: fx.Node) -> None:
    packed.node.replace_all_uses_with(replacement)
    erase(packed.gm, packed.node)
