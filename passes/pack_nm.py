"""masked -> packed:  linear(x, mask(w, keep), b)  =>  nm_linear(x, values, index, b, n, m)

Runs after InsertMasks. Takes weights whose tightest pattern is n:m with m in 4, 8, 16; leaves
others as they are. Decided from the zeros alone: the packed weight is w, bit for bit.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from sparsefx.formats import pack_nm
from sparsefx.masked import MaskedLinear, rules
from sparsefx.pipeline import PassContext
from sparsefx.rewrite import Decline, Site, rewrite
from sparsefx.spec import NM

_nm_linear = torch.ops.sparsefx.nm_linear.default


@dataclass(frozen=True)
class PackNM:
    """Stores n:m weights as kept values and their columns."""

    name: str = "pack_nm"
    stage: str = "packed"

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> int:
        """Returns how many linears were packed."""
        return rewrite(gm, rules(partial(_pack, ctx)), self.name, ctx.decline)


def _pack(ctx: PassContext, site: Site, linear: MaskedLinear) -> fx.Node | Decline | None:
    pattern = ctx.weights.found(linear.weight, linear.transposed).pattern
    if not isinstance(pattern, NM):
        return None
    n, m = pattern.n, pattern.m
    values, index = ctx.weights.packed(
        linear.weight, linear.transposed, f"{n}:{m}", lambda w: tuple(pack_nm(w, n, m))
    )
    stored = [
        site.constant(f"{linear.w.target}_values", values),
        site.constant(f"{linear.w.target}_index", index),
    ]
    node = site.call(_nm_linear, linear.x, *stored, linear.bias, n, m, "", [])
    node.meta["sparsefx_weight"] = (str(linear.w.target), linear.transposed)
    return node
