"""packed -> lowered:  nm_linear(x, values, index, b, ..)  =>  kernel(x, packed, b, extras, handle)

or, where no kernel of the target accepts the node and wins:  =>  epilogue(linear(x, w, b))

Runs last. "Wins" is the guard's word: measured on this device, modelled by the roofline, or, with
guard="off", taken for granted. Every node gets its times or its reason in the report.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, fx

from sparsefx import dump, guard
from sparsefx.attributes import get_tensor
from sparsefx.candidates import rows_of
from sparsefx.epilogue import Step, parse
from sparsefx.errors import KernelBuildFailed
from sparsefx.ops import PACKED_OPS
from sparsefx.pipeline import PassContext
from sparsefx.rewrite import Site, erase
from sparsefx.target import Kernel, LinearSpec, Lowering, Target

aten = torch.ops.aten
_nm_linear = torch.ops.sparsefx.nm_linear.default

Judge = Callable[[LinearSpec, Tensor, Tensor | None, Lowering], guard.Verdict]
"""Compares a built kernel with dense: (spec, dense weight [out, in], bias, lowering) -> verdict."""


@dataclass(frozen=True)
class Lower:
    """Gives each packed node to the target's first kernel that accepts it and wins."""

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


@dataclass(frozen=True)
class PackedNode:
    """A packed linear of a graph, read."""

    gm: fx.GraphModule
    node: fx.Node
    ctx: PassContext

    @property
    def stored(self) -> list[fx.Node]:
        """The nodes of its packed tensors."""
        count = 2 if self.node.target is _nm_linear else 3
        return list(self.node.args[1 : 1 + count])  # type: ignore[arg-type]

    @property
    def packed(self) -> tuple[Tensor, ...]:
        """Its packed tensors."""
        return tuple(get_tensor(self.gm, str(node.target)) for node in self.stored)

    @property
    def bias(self) -> fx.Node | None:
        """The node of its bias."""
        return self.node.args[1 + len(self.stored)]  # type: ignore[return-value]

    @property
    def epilogue(self) -> str:
        """Its epilogue, as text."""
        return str(self.node.args[-2])

    @property
    def extras(self) -> list[fx.Node]:
        """The nodes of its epilogue's operands."""
        return list(self.node.args[-1])  # type: ignore[arg-type]

    def dense(self) -> Tensor:
        """The dense weight [out, in]: a view of the parameter."""
        name, transposed = self.node.meta["sparsefx_weight"]
        weight = self.ctx.dense[name].detach()
        return weight.t() if transposed else weight

    def spec(self) -> LinearSpec:
        """What kernels may know of it."""
        x = self.node.args[0]
        assert isinstance(x, fx.Node)
        rows, vary = rows_of(x)
        dense, values = self.dense(), self.packed[0]
        is_nm = self.node.target is _nm_linear
        return LinearSpec(
            layout="nm" if is_nm else "bitmap",
            out_features=dense.shape[0],
            in_features=dense.shape[1],
            n=int(self.node.args[4]) if is_nm else 0,  # type: ignore[arg-type]
            m=int(self.node.args[5]) if is_nm else 0,  # type: ignore[arg-type]
            density=values.numel() / max(1, dense.numel()),
            dtype=dense.dtype,
            has_bias=self.bias is not None,
            epilogue=self.epilogue,
            rows=rows,
            rows_vary=vary,
        )


def _lower(options: Lower, packed: PackedNode) -> int:
    spec = packed.spec()
    reasons: list[str] = []
    for kernel in options.target.kernels:
        if kernel.layout != spec.layout:
            continue
        refusal = kernel.accepts(spec) or _refusal(packed, spec)
        if refusal:
            reasons.append(f"{kernel.name}: {refusal}")
            continue
        try:
            if _try(options, packed, spec, kernel, reasons):
                return 1
        except (KernelBuildFailed, OSError) as error:  # OSError: no place to keep the kernel
            reasons.append(f"{kernel.name}: {error}")
    layout = "N:M" if spec.layout == "nm" else "bitmap"
    nothing = f"target {options.target.name} has no {layout} kernel"
    packed.ctx.decline(packed.node, "; ".join(reasons) or nothing)
    _replace(packed, dense_form(packed))
    return 0


def _refusal(packed: PackedNode, spec: LinearSpec) -> str | None:
    """Why no kernel may have this node."""
    x = packed.node.args[0]
    assert isinstance(x, fx.Node)
    dtype = x.meta["val"].dtype
    if dtype != spec.dtype:
        return f"input is {dtype} and the weight {spec.dtype}"
    if packed.dense().is_inference():
        return "torch counts no changes of a weight made in inference mode; load it outside of that"
    return None


def _try(
    options: Lower, packed: PackedNode, spec: LinearSpec, kernel: Kernel, reasons: list[str]
) -> bool:
    lowering = kernel.lower(spec, packed.packed)
    bias = None if packed.bias is None else _value(packed.bias)
    verdict = options.judge(spec, packed.dense(), bias, lowering)
    packed.ctx.update(
        packed.node,
        dense_us=verdict.dense_us,
        sparse_us=verdict.sparse_us,
        how=verdict.how,
        error=verdict.error,
    )
    if verdict.fault or (options.proof and not verdict.wins):
        reasons.append(f"{kernel.name}: {verdict.fault or verdict.reason}")
        return False
    size = sum(tensor.numel() * tensor.element_size() for tensor in lowering.packed)
    packed.ctx.update(packed.node, kernel=kernel.name, stored_bytes=size)
    dump.kernel(Path(lowering.path), lowering.text)
    packed.ctx.baked.add(packed.node.meta["sparsefx_weight"][0])
    _replace(packed, _kernel_call(packed, lowering))
    return True


def _value(node: fx.Node) -> Tensor | None:
    value = node.meta["val"]
    return value if node.op == "get_attr" else torch.zeros(value.shape[-1], dtype=value.dtype)


def _kernel_call(packed: PackedNode, lowering: Lowering) -> fx.Node:
    site = Site(packed.gm, packed.node, "lower")
    weight = packed.node.meta["sparsefx_weight"][0]
    stored: list[fx.Node] = []
    for number, tensor in enumerate(lowering.packed):
        same = [n for n, t in zip(packed.stored, packed.packed, strict=True) if t is tensor]
        name = f"{weight}_{lowering.handle}_{number}".replace("-", "_").replace(":", "_")
        stored.append(same[0] if same else site.constant(name, tensor))
    x = packed.node.args[0]
    rest = (packed.bias, packed.extras, lowering.handle, lowering.features)
    return site.call(lowering.op, x, stored, *rest)


def dense_form(packed: PackedNode) -> fx.Node:
    """The node as plain aten calls on the dense weight, which must be an attribute again."""
    name, transposed = packed.node.meta["sparsefx_weight"]
    site = Site(packed.gm, packed.node, "lower")
    weight = site.constant(name, packed.ctx.dense[name])
    if transposed:
        weight = site.call(aten.t.default, weight)
        weight.meta["val"] = packed.dense()
    x = packed.node.args[0]
    node = site.call(aten.linear.default, x, weight, packed.bias)
    for step in parse(packed.epilogue):
        node = _dense_step(site, node, step, packed.extras)
    return node


def _dense_step(site: Site, node: fx.Node, step: Step, extras: list[fx.Node]) -> fx.Node:
    match step.op:
        case "relu":
            return site.call(aten.relu.default, node)
        case "silu":
            return site.call(aten.silu.default, node)
        case "gelu" | "gelu_tanh":
            result = site.call(aten.gelu.default, node)
            result.kwargs = {"approximate": "tanh" if step.op == "gelu_tanh" else "none"}
            return result
        case "scale":
            return site.call(aten.mul.Tensor, node, step.operand)
        case "add":
            return site.call(aten.add.Tensor, node, extras[int(step.operand or 0)])
        case _:
            return site.call(aten.mul.Tensor, node, extras[int(step.operand or 0)])


def _replace(packed: PackedNode, replacement: fx.Node) -> None:
    packed.node.replace_all_uses_with(replacement)
    erase(packed.gm, packed.node)
