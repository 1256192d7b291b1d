"""masked -> packed:  linear(x, mask(w, keep), b)  =>  bitmap_linear(x, values, bits, row_ptr, b)

Runs after PackNM and PackBlock and takes what they left.
"""

from dataclasses import dataclass
from functools import partial

from torch import fx

from sparsefx.masked import MaskedLinear, rules
from sparsefx.packing import Packing
from sparsefx.passes.store import store
from sparsefx.pipeline import PassContext
from sparsefx.rewrite import Decline, Site, rewrite

_LIMIT = 2**31


@dataclass(frozen=True)
class PackBitmap:
    """Stores sparse weights as nonzeros and one bit an element."""

    name: str = "pack_bitmap"
    stage: str = "packed"

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> int:
        """Returns how many linears were packed."""
        return rewrite(gm, rules(partial(_pack, ctx)), self.name, ctx.decline)


def _pack(ctx: PassContext, site: Site, linear: MaskedLinear) -> fx.Node | Decline | None:
    if linear.weight.numel() >= _LIMIT:
        return Decline("a bitmap counts nonzeros in 32 bits and the weight has more elements")
    pattern = ctx.weights.found(linear.weight, linear.transposed).pattern
    packing = Packing("bitmap") if pattern is None else Packing.of(pattern).as_bitmap()
    return store(ctx, site, linear, packing)
