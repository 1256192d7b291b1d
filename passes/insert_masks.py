"""dense -> masked:  linear(x, w, b)  =>  linear(x, mask(w, keep), b)   where keep = (w != 0)

Runs after Detect, on the weights in which it found a pattern. The mask says what the pattern is
allowed to touch: gradients of a masked weight stay masked.
"""

from dataclasses import dataclass

import torch
from torch import fx

from sparsefx.candidates import Candidate, candidates, parameter_name
from sparsefx.pipeline import PassContext
from sparsefx.rewrite import Site

_mask = torch.ops.sparsefx.mask.default


@dataclass(frozen=True)
class InsertMasks:
    """Masks every constant weight in which a pattern was found; with `only`, those named there."""

    only: frozenset[str] | None = None
    name: str = "insert_masks"
    stage: str = "masked"

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> int:
        """Returns how many linears got a mask."""
        masked = [c for c in candidates(gm) if self._takes(c, ctx)]
        for candidate in masked:
            _insert(gm, candidate, self.name)
        return len(masked)

    def _takes(self, candidate: Candidate, ctx: PassContext) -> bool:
        if candidate.weight is None or "sparsefx_row" not in candidate.node.meta:
            return False
        if ctx.row(candidate.node).reason:
            return False
        return self.only is None or parameter_name(candidate.weight) in self.only


def _insert(gm: fx.GraphModule, candidate: Candidate, author: str) -> None:
    weight = candidate.weight
    assert weight is not None
    value = weight.meta["val"]
    site = Site(gm, candidate.node, author)
    keep = site.constant(f"{weight.target}_keep", value.detach() != 0)
    mask = site.call(_mask, weight, keep)
    mask.meta.pop("sparsefx_row", None)
    mask.meta["val"] = value
    candidate.node.replace_input_with(weight, mask)
