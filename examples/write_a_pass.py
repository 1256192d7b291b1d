"""dense -> dense:  linear(x, w, b)  =>  zeros_like(x[..., :1]) + b   where w = 0 everywhere

Runs after Detect. Structured pruning and training from a zero start (LoRA, ReZero) leave such
layers behind. Equal for finite x: 0 * inf is not a number, and no longer computed.

The pass that docs/write_a_pass.md describes, and a model to run it on.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx, nn

from sparsefx.graph import capture
from sparsefx.mutation import changed_in_graph
from sparsefx.passes.detect import Detect
from sparsefx.pipeline import PassContext, run
from sparsefx.rewrite import Decline, Rule, Site, Var, call, rewrite

aten = torch.ops.aten
_linear = call(aten.linear.default)


@dataclass(frozen=True)
class DropZeroLinears:
    """Replaces linears whose weight is zero by their bias, or by zeros."""

    name: str = "drop_zero_linears"
    stage: str = "dense"

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> int:
        """Returns how many linears were dropped."""
        rules = (Rule(_linear(Var("x"), Var("w"), Var("b")), partial(_drop, ctx)),)
        return rewrite(gm, rules, self.name, ctx.decline)


def _drop(
    ctx: PassContext, site: Site, x: fx.Node, w: fx.Node, b: fx.Node | None
) -> fx.Node | Decline | None:
    if w.op != "get_attr" or changed_in_graph(w):
        return Decline("the weight is computed or changed in the graph")
    weight = w.meta["val"]
    if bool(weight.any()) or not weight.numel() or site.root.meta["val"].dtype != weight.dtype:
        return None
    rows = site.call(aten.slice.Tensor, x, -1, 0, 1)
    rows.meta["val"] = x.meta["val"][..., :1]
    zeros = site.call(aten.zeros_like.default, rows)
    zeros.meta["val"] = rows.meta["val"]
    added = b or site.constant(f"{w.target}_zeros", weight.new_zeros(weight.shape[0]))
    ctx.baked.add(str(w.target))
    ctx.decline(site.root, "every weight is zero: the layer was replaced by its bias")
    return site.call(aten.add.Tensor, zeros, added)


class Branches(nn.Module):
    """Two branches, the second one switched off by pruning."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.main = nn.Linear(width, width)
        self.pruned = nn.Linear(width, width)
        nn.init.zeros_(self.pruned.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> the same shape."""
        return torch.relu(self.main(x)) + self.pruned(x)


def main() -> None:
    """Prints the graph of a small model before and after the pass, and what it did."""
    torch.manual_seed(0)
    model, x = Branches().eval(), torch.randn(4, 8)
    gm, ctx = capture(model, (x,)), PassContext()
    print(f"before\n{gm.graph}\n")
    counts = run(gm, (Detect(), DropZeroLinears()), ctx)
    print(f"after\n{gm.graph}\n")
    print(f"linears dropped: {counts['drop_zero_linears']}")
    for row in ctx.rows.values():
        print(f"  {row.name}: {row.reason or row.pattern}")
    with torch.no_grad():
        print(f"largest difference: {float((gm(x) - model(x)).abs().max())}")


if __name__ == "__main__":
    main()
