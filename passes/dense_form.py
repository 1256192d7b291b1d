"""A packed node back as plain aten calls on its dense weight, which Inductor takes over."""

import sys

import torch
from torch import fx

from sparsefx.epilogue import GATES, Step, parse
from sparsefx.ops import linear_output
from sparsefx.passes.packed_node import PackedNode
from sparsefx.rewrite import Site

aten = torch.ops.aten


def dense_form(packed: PackedNode, author: str) -> fx.Node:
    """epilogue(linear(x, w, b)) on the dense weight, which becomes an attribute again."""
    site = Site(packed.gm, packed.node, author)
    weight = dense_weight(packed, site)
    if packed.weight[1]:
        weight = site.call(aten.t.default, weight)
        weight.meta["val"] = packed.dense()
    node = site.call(aten.linear.default, packed.x, weight, packed.bias)
    node.meta["val"] = linear_output(packed.x.meta["val"], packed.dense().shape[0])
    return with_epilogue(packed, site, node)


def dense_weight(packed: PackedNode, site: Site) -> fx.Node:
    """The model's own parameter, as it is stored."""
    name, _ = packed.weight
    return site.constant(name, packed.ctx.dense[name])


def with_epilogue(packed: PackedNode, site: Site, node: fx.Node) -> fx.Node:
    """The steps of the epilogue after `node`, each a call that Inductor can fuse."""
    for step in parse(packed.epilogue):
        node = _step(site, node, step, packed.extras)
    return node


def _step(site: Site, node: fx.Node, step: Step, extras: list[fx.Node]) -> fx.Node:
    match step.op:
        case "scale":
            return site.call(aten.mul.Tensor, node, step.operand)
        case "add":
            return site.call(aten.add.Tensor, node, extras[int(step.operand or 0)])
        case "mul":
            return site.call(aten.mul.Tensor, node, extras[int(step.operand or 0)])
        case gate if gate in GATES:
            gates = _activated(site, _every_other(site, node, 0), gate.removeprefix("gate_"))
            return site.call(aten.mul.Tensor, gates, _every_other(site, node, 1))
        case _:
            return _activated(site, node, step.op)


def _every_other(site: Site, node: fx.Node, first: int) -> fx.Node:
    return site.call(aten.slice.Tensor, node, -1, first, sys.maxsize, 2)


def _activated(site: Site, node: fx.Node, activation: str) -> fx.Node:
    match activation:
        case "relu":
            return site.call(aten.relu.default, node)
        case "silu":
            return site.call(aten.silu.default, node)
        case _:
            result = site.call(aten.gelu.default, node)
            result.kwargs = {"approximate": "tanh" if activation == "gelu_tanh" else "none"}
            return result
