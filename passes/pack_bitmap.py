"""masked -> packed:  linear(x, mask(w, keep), b)  =>  bitmap_linear(x, values, bits, row_ptr, b)

Runs after PackNM and takes what it left: unstructured weights, and blocks, for which there is no
kernel of their own yet.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import fx

from sparsefx.formats import pack_bitmap
from sparsefx.masked import MaskedLinear, rules
from sparsefx.pipeline import PassContext
from sparsefx.rewrite import Decline, Site, rewrite

_bitmap_linear = torch.ops.sparsefx.bitmap_linear.default
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
    parts = ctx.weights.packed(
        linear.weight, linear.transposed, "bitmap", lambda w: tuple(pack_bitmap(w))
    )
    names = ("values", "bits", "row_ptr")
    stored = [
        site.constant(f"{linear.w.target}_{name}", part)
        for name, part in zip(names, parts, strict=True)
    ]
    node = site.call(_bitmap_linear, linear.x, *stored, linear.bias, "", [])
    node.meta["sparsefx_weight"] = (str(linear.w.target), linear.transposed)
    return node
