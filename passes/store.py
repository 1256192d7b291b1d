"""How passes put a packed linear into the graph: one call of the layout's operator."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from sparsefx.masked import MaskedLinear
from sparsefx.ops import LAYOUT_OPS
from sparsefx.packing import Packing
from sparsefx.pipeline import PassContext
from sparsefx.rewrite import Site


def store(ctx: PassContext, site: Site, linear: MaskedLinear, packing: Packing) -> fx.Node:
    """A packed operator in place of `linear`; its weight is packed once a model."""
    parts = ctx.weights.packed(linear.weight, linear.transposed, repr(packing), packing.pack)
    weight = PackedWeight((str(linear.w.target), linear.transposed), packing, parts)
    return weight.call(site, linear.x, linear.bias)


@dataclass(frozen=True)
class PackedWeight:
    """A weight as a graph stores it: `tensors` as `packing` says.

    `dense`: the name of the dense weight, and whether that is stored [in, out].
    """

    dense: tuple[str, bool]
    packing: Packing
    tensors: tuple[Tensor, ...]

    def call(
        self,
        site: Site,
        x: fx.Node,
        bias: fx.Node | None,
        epilogue: str = "",
        extras: Sequence[fx.Node] = (),
    ) -> fx.Node:
        """The packed operator before the site's root.

        Its meta keeps the packing ("sparsefx_packing") and the dense weight ("sparsefx_weight").
        """
        packing = self.packing
        stored = [
            site.constant(f"{self.dense[0]}_{name}", part)
            for name, part in zip(packing.parts, self.tensors, strict=True)
        ]
        scales = stored.pop() if packing.values else None
        numbers = {"nm": (packing.n, packing.m), "block": packing.block}.get(packing.layout, ())
        op = LAYOUT_OPS[packing.layout]
        node = site.call(op, x, *stored, bias, *numbers, epilogue, list(extras))
        if scales is not None:
            node.kwargs = {"scales": scales, "kind": packing.values, "group": packing.group}
        node.meta["sparsefx_weight"] = self.dense
        node.meta["sparsefx_packing"] = packing
        return node
