"""masked -> packed:  linear(x, mask(w, keep), b)  =>  nm_linear(x, values, index, b, n, m)

Runs after InsertMasks. Takes weights whose tightest pattern is n:m with m in 4, 8, 16; leaves
others as they are. Decided from the zeros alone: the packed weight is w, bit for bit.
"""

from dataclasses import dataclass
from functools import partial

from torch import fx

from sparsefx.masked import MaskedLinear, rules
from sparsefx.packing import Packing
from sparsefx.passes.store import store
from sparsefx.pipeline import PassContext
from sparsefx.rewrite import Decline, Site, rewrite


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
    packing = None if pattern is None else Packing.of(pattern)
    if packing is None or packing.layout != "nm":
        return None
    return store(ctx, site, linear, packing)
