"""The masked linears of a graph, in each way that a linear is written, as rules see them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sparsefx.rewrite import Built, Decline, Rule, Site, Var, call

aten = torch.ops.aten
_mask = call(torch.ops.sparsefx.mask.default)(Var("w"), Var("keep"))


@dataclass(frozen=True)
class MaskedLinear:
    """y = x W^T + b with W = mask(w, keep). `transposed`: w is stored [in, out]."""

    x: fx.Node
    w: fx.Node
    bias: fx.Node | None
    transposed: bool

    @property
    def weight(self) -> Tensor:
        """The weight as its parameter holds it."""
        value = self.w.meta["val"]
        assert isinstance(value, Tensor)
        return value


Pack = Callable[[Site, MaskedLinear], Built]


def rules(pack: Pack) -> tuple[Rule, ...]:
    """Rules that call `pack` at each masked linear, however it is written."""

    def linear(site: Site, x: fx.Node, w: fx.Node, keep: fx.Node, b: fx.Node | None) -> Built:
        return pack(site, MaskedLinear(x, w, b, transposed=False))

    def product(site: Site, x: fx.Node, w: fx.Node, keep: fx.Node) -> Built:
        return pack(site, MaskedLinear(x, w, None, transposed=True))

    def addmm(site: Site, x: fx.Node, w: fx.Node, keep: fx.Node, b: fx.Node) -> Built:
        if b.meta["val"].dim() != 1:
            return Decline("the addend of addmm is not a bias vector")
        return pack(site, MaskedLinear(x, w, b, transposed=True))

    return (
        Rule(call(aten.linear.default)(Var("x"), _mask, Var("b")), linear),
        Rule(call(aten.addmm.default)(Var("b"), Var("x"), _mask, 1, 1), addmm),
        Rule(call(aten.matmul.default)(Var("x"), _mask), product),
        Rule(call(aten.mm.default)(Var("x"), _mask), product),
    )
