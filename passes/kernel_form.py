"""A packed node as a call of what was chosen for it: one kernel, or a table of them by rows."""

import torch
from torch import Tensor, fx

from sparsefx.by_rows import Dense, Pick, Route, Routes
from sparsefx.choice import Offer
from sparsefx.ladder import Table
from sparsefx.ops import linear_output
from sparsefx.passes.dense_form import dense_weight, with_epilogue
from sparsefx.passes.packed_node import PackedNode
from sparsefx.rewrite import Site
from sparsefx.target import Lowering

_by_rows = torch.ops.sparsefx_rows.linear.default


def kernel_form(packed: PackedNode, lowering: Lowering, author: str) -> fx.Node:
    """The kernel on the node's operands, its epilogue inside."""
    site = Site(packed.gm, packed.node, author)
    stored = [_constant(packed, site, lowering, place) for place in range(len(lowering.packed))]
    rest = (packed.bias, packed.extras, lowering.handle, lowering.features)
    return site.call(lowering.op, packed.x, stored, *rest)


def by_rows_form(packed: PackedNode, table: Table, author: str) -> fx.Node:
    """The table's kernels and dense behind one call, the epilogue behind it.

    There Inductor fuses it into what follows, as it does behind a dense product; inside of the call
    dense rows would pay for it in passes over memory of their own.
    """
    site = Site(packed.gm, packed.node, author)
    nodes: list[fx.Node] = []
    places: dict[int, int] = {}  # id of a tensor -> its place; kernels may share tensors
    for lowering in (offer.lowering for offer in table.offers):
        for number, tensor in enumerate(lowering.packed):
            if id(tensor) not in places:
                places[id(tensor)] = len(nodes)
                nodes.append(_constant(packed, site, lowering, number))
    weight, dense = _dense_part(packed, site, table, nodes)
    ranges = tuple(
        Route(each.first, tuple(_pick(offer, places) for offer in each.offers))
        for each in table.ranges
    )
    routes, out = str(Routes(ranges, dense)), packed.shape[0]
    node = site.call(_by_rows, packed.x, nodes, weight, packed.bias, [], routes, out)
    node.meta["val"] = linear_output(packed.x.meta["val"], out)
    return with_epilogue(packed, site, node)


def _dense_part(
    packed: PackedNode, site: Site, table: Table, nodes: list[fx.Node]
) -> tuple[fx.Node | None, Dense]:
    """The node of the dense weight, if rows go dense and there is one, and how it is read.

    Packed tensors that dense rows unpack are added to `nodes`.
    """
    if all(each.is_total for each in table.ranges):
        return None, Dense()
    if not packed.is_packed_only:
        return dense_weight(packed, site), Dense(packed.weight[1])
    nodes += [node for node in packed.stored if node not in nodes]
    places = tuple(nodes.index(node) for node in packed.stored)
    return None, Dense(packing=packed.packing, tensors=places)


def _pick(offer: Offer, places: dict[int, int]) -> Pick:
    lowering = offer.lowering
    tensors = tuple(places[id(tensor)] for tensor in lowering.packed)
    namespace, _, name = lowering.op._schema.name.partition("::")
    return Pick(f"{namespace}::{name}", lowering.handle, tensors, lowering.multiple)


def _constant(packed: PackedNode, site: Site, lowering: Lowering, number: int) -> fx.Node:
    """The node of one of the kernel's tensors: the packed node's own where it is the same."""
    tensor: Tensor = lowering.packed[number]
    for node, own in zip(packed.stored, packed.packed, strict=True):
        if own is tensor:
            return node
    name = f"{packed.prefix}_{lowering.handle}_{number}".replace("-", "_").replace(":", "_")
    return site.constant(name, tensor)
