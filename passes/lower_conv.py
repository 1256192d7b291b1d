"""packed -> packed:  conv2d(x, w, b, stride, padding)  =>  kernel(x, taps, b, ..)

for each 2-d convolution with a constant sparse weight for which a kernel of the target wins at the
example's images, and where calls bring other batches, at one image and at four times as many too.
All others stay dense, with the reason in the report. The result lies in memory as dense's would.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor, fx

from sparsefx import dump
from sparsefx.candidates import candidates
from sparsefx.convolutions import ConvKernel, ConvLowering, ConvSpec, Taps, pack_taps
from sparsefx.detect import Found, tightest
from sparsefx.errors import KernelBuildFailed
from sparsefx.guard import Verdict
from sparsefx.passes.conv_node import ConvNode
from sparsefx.pipeline import PassContext
from sparsefx.rewrite import Site, erase
from sparsefx.target import Target

ConvJudge = Callable[[ConvSpec, Tensor, Taps, Tensor | None, ConvLowering], Verdict]
"""Compares a built kernel with dense: (spec, dense weight, its taps, bias, lowering) -> verdict."""


@dataclass(frozen=True)
class LowerConv:
    """Gives each convolution to the target's first kernel that accepts it and wins."""

    target: Target
    judge: ConvJudge = field(compare=False)
    proof: bool = True
    """Whether a kernel must win; False is guard="off"."""
    name: str = "lower_conv"
    stage: str = "folded"

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> int:
        """Returns how many nodes were given to a kernel."""
        found = [each.node for each in candidates(gm) if each.op == "conv"]
        nodes = [node for node in found if "sparsefx_row" in node.meta]
        return sum(_lower(self, gm, ConvNode.read(node), ctx) for node in nodes)


def _lower(options: LowerConv, gm: fx.GraphModule, conv: ConvNode, ctx: PassContext) -> bool:
    refusal = conv.refusal()
    if refusal:
        ctx.decline(conv.node, f"convolution: {refusal}")
        return False
    weight = conv.weight.detach()
    found = _pattern(weight)
    size = weight.nbytes
    ctx.update(conv.node, shape=conv.text, dense_bytes=size, stored_bytes=size)
    if found.pattern is None:
        ctx.decline(conv.node, found.reason)
        return False
    ctx.update(conv.node, pattern=str(found.pattern))
    taps = Taps(*ctx.weights.packed(conv.weight, False, "taps", pack_taps))
    lowering = _chosen(options, conv, taps, conv.spec(1 - found.sparsity), ctx)
    if lowering is None:
        return False
    _replace(options, gm, conv, taps, lowering)
    name = str(conv.weight_node.target)
    stored = sum(tensor.nbytes for tensor in taps)
    ctx.update(conv.node, reason="", stored_bytes=stored, kept_bytes=stored + size)
    ctx.baked.add(name)
    dump.kernel(Path(lowering.path), lowering.text)
    return True


def _pattern(weight: Tensor) -> Found:
    """What its zeros follow, where `sparsify` lays patterns: along the input channels."""
    return tightest(weight.movedim(1, -1).flatten(1))


def _chosen(
    options: LowerConv, conv: ConvNode, taps: Taps, spec: ConvSpec, ctx: PassContext
) -> ConvLowering | None:
    reasons = []
    for kernel in options.target.convolutions:
        found = _tried(options, kernel, conv, taps, spec)
        if isinstance(found, str):
            reasons.append(f"{kernel.name}: {found}")
            continue
        lowering, verdicts = found
        worst = max(verdicts, key=lambda each: each.ratio)
        shown = verdicts[0]
        times = {"dense_us": shown.dense_us, "sparse_us": shown.sparse_us, "how": shown.how}
        ctx.update(conv.node, **times, error=shown.error)
        if not worst.fault and (worst.wins or not options.proof):
            ctx.update(conv.node, kernel=kernel.name)
            return lowering
        where = "" if worst is shown else " at other numbers of images"
        reasons.append(f"{kernel.name}: {worst.reason}{where}")
    missing = f"target {options.target.name} has no kernel for convolutions"
    ctx.decline(conv.node, "; ".join(reasons) or missing)
    return None


def _tried(
    options: LowerConv, kernel: ConvKernel, conv: ConvNode, taps: Taps, spec: ConvSpec
) -> tuple[ConvLowering, list[Verdict]] | str:
    """A built kernel and the verdicts on it, the example's first; or why there is none."""
    refusal = kernel.accepts(spec)
    if refusal:
        return refusal
    try:
        lowering = kernel.lower(spec)
        return lowering, [
            options.judge(each, conv.weight, taps, conv.bias_value, lowering)
            for each in _asked(spec, conv.batch_varies)
        ]
    except (KernelBuildFailed, OSError) as error:  # OSError: no place to keep the kernel
        return str(error)


def _asked(spec: ConvSpec, batch_varies: bool) -> Iterator[ConvSpec]:
    yield spec
    if batch_varies:
        yield replace(spec, batch=1)
        yield replace(spec, batch=4 * spec.batch)


def _replace(
    options: LowerConv, gm: fx.GraphModule, conv: ConvNode, taps: Taps, lowering: ConvLowering
) -> None:
    site = Site(gm, conv.node, options.name)
    name = str(conv.weight_node.target)
    stored = [
        site.constant(f"{name}_tap_{part}", tensor)
        for part, tensor in zip(Taps._fields, taps, strict=True)
    ]
    rest = (list(conv.weight.shape), conv.stride[0], conv.padding[0], conv.gives_channels_last)
    call = site.call(lowering.op, conv.x, stored, conv.bias, *rest, lowering.handle)
    conv.node.replace_all_uses_with(call)
    erase(gm, conv.node)
