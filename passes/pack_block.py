"""masked -> packed:  linear(x, mask(w, keep), b)  =>  block_linear(x, values, columns, row_ptr, b)

Runs after PackNM. Takes weights whose tightest pattern is blocks and that are smaller as blocks
than as a bitmap, which a block's zeros and its 32-bit column may prevent; leaves others.
"""

from dataclasses import dataclass
from functools import partial

from torch import fx

from sparsefx.cost import weight_bytes
from sparsefx.detect import Found
from sparsefx.masked import MaskedLinear, rules
from sparsefx.packing import Packing
from sparsefx.passes.store import store
from sparsefx.pipeline import PassContext
from sparsefx.rewrite import Decline, Site, rewrite
from sparsefx.spec import Block


@dataclass(frozen=True)
class PackBlock:
    """Stores weights of zero blocks as the blocks that are left."""

    name: str = "pack_block"
    stage: str = "packed"

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> int:
        """Returns how many linears were packed."""
        return rewrite(gm, rules(partial(_pack, ctx)), self.name, ctx.decline)


def _pack(ctx: PassContext, site: Site, linear: MaskedLinear) -> fx.Node | Decline | None:
    found = ctx.weights.found(linear.weight, linear.transposed)
    if not isinstance(found.pattern, Block) or not _is_smaller(found, linear):
        return None
    return store(ctx, site, linear, Packing.of(found.pattern))


def _is_smaller(found: Found, linear: MaskedLinear) -> bool:
    """Whether blocks take fewer bytes than the bitmap that stores the same weight."""
    assert isinstance(found.pattern, Block)
    in_, out = linear.weight.shape if linear.transposed else linear.weight.shape[::-1]
    densities = (1 - found.pattern.sparsity, 1 - found.sparsity)
    packing = Packing.of(found.pattern)
    blocks, bitmap = (
        weight_bytes(
            each.layout,
            out,
            in_,
            *(each.n, each.m, density, linear.weight.dtype),
            block=each.block,
            values=each.values,
            group=each.group,
        )
        for each, density in zip((packing, packing.as_bitmap()), densities, strict=True)
    )
    return bool(blocks < bitmap)
