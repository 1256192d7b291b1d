"""masked -> dense:  mask(w, keep)  =>  w'   where w' = w * keep, computed now

Runs after the packing passes, on masks that nothing packed. Where w is already zero outside keep
(always, when the mask was read off the zeros) w' is w itself and the parameter keeps its name.
"""

from dataclasses import dataclass

import torch
from torch import fx

from sparsefx.pipeline import PassContext
from sparsefx.rewrite import Decline, Rule, Site, Var, call, rewrite

_mask = call(torch.ops.sparsefx.mask.default)


@dataclass(frozen=True)
class FoldMasks:
    """Replaces constant masks by the masked weight."""

    name: str = "fold_masks"
    stage: str = "folded"

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> int:
        """Returns how many masks were folded."""
        return rewrite(gm, (Rule(_mask(Var("w"), Var("keep")), _fold),), self.name, ctx.decline)


def _fold(site: Site, w: fx.Node, keep: fx.Node) -> fx.Node | Decline | None:
    if w.op != "get_attr" or keep.op != "get_attr":
        return Decline("the mask is computed in the graph")
    weight, kept = w.meta["val"], keep.meta["val"]
    if bool(((weight == 0) | kept).all()):
        return w
    return site.constant(f"{w.target}_masked", torch.where(kept, weight.detach(), 0))
