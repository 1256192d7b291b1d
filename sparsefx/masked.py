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

    def _pack(site: Site, linear: MaskedLinear) -> Built:
        misfit = _misfit(site, linear)
        return Decline(misfit) if misfit else pack(site, linear)

    def linear(site: Site, x: fx.Node, w: fx.Node, keep: fx.Node, b: fx.Node | None) -> Built:
        return _pack(site, MaskedLinear(x, w, b, transposed=False))

    def product(site: Site, x: fx.Node, w: fx.Node, keep: fx.Node) -> Built:
        return _pack(site, MaskedLinear(x, w, None, transposed=True))

    def addmm(site: Site, x: fx.Node, w: fx.Node, keep: fx.Node, b: fx.Node) -> Built:
        return _pack(site, MaskedLinear(x, w, b, transposed=True))

    return (
        Rule(call(aten.linear.default)(Var("x"), _mask, Var("b")), linear),
        Rule(call(aten.addmm.default)(Var("b"), Var("x"), _mask, 1, 1), addmm),
        Rule(call(aten.matmul.default)(Var("x"), _mask), product),
        Rule(call(aten.mm.default)(Var("x"), _mask), product),
    )


def _misfit(site: Site, linear: MaskedLinear) -> str | None:
    """Why a packed operator would not mean the same."""
    out = linear.weight.shape[1 if linear.transposed else 0]
    result, dtype = site.root.meta["val"].dtype, linear.weight.dtype
    if linear.bias is not None and tuple(linear.bias.meta["val"].shape) != (out,):
        return f"what is added is no bias vector of {out} numbers"
    if result != dtype:
        return f"autocast computes this layer in {result} and its weight is {dtype}"
    return None
