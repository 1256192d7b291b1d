"""How the packing passes put a packed linear into the graph: one call of the layout's operator."""

from torch import fx

from sparsefx.masked import MaskedLinear
from sparsefx.ops import LAYOUT_OPS
from sparsefx.packing import Packing
from sparsefx.pipeline import PassContext
from sparsefx.rewrite import Site


def store(ctx: PassContext, site: Site, linear: MaskedLinear, packing: Packing) -> fx.Node:
    """The packed operator in place of `linear`, its weight stored as `packing` says, once a model.

    Its meta keeps `packing` ("sparsefx_packing") and where the dense weight is ("sparsefx_weight":
    its name, and whether it is stored [in, out]).
    """
    parts = ctx.weights.packed(linear.weight, linear.transposed, repr(packing), packing.pack)
    stored = [
        site.constant(f"{linear.w.target}_{name}", part)
        for name, part in zip(packing.parts, parts, strict=True)
    ]
    scales = stored.pop() if packing.values else None
    numbers = {"nm": (packing.n, packing.m), "block": packing.block}.get(packing.layout, ())
    op = LAYOUT_OPS[packing.layout]
    node = site.call(op, linear.x, *stored, linear.bias, *numbers, "", [])
    if scales is not None:
        node.kwargs = {"scales": scales, "kind": packing.values, "group": packing.group}
    node.meta["sparsefx_weight"] = (str(linear.w.target), linear.transposed)
    node.meta["sparsefx_packing"] = packing
    return node
