"""Packed linears that the model itself brings: candidates like those that packing makes.

`compile(memory="small")` puts `packed_module.PackedLinear` layers in place of dense ones. Part of
Detect.
"""

from torch import fx

from sparsefx.candidates import module_path, rows_of
from sparsefx.ops import LAYOUT_OPS, PACKED_OPS
from sparsefx.packing import PARTS, Packing
from sparsefx.passes.packed_node import PackedNode
from sparsefx.pipeline import PassContext
from sparsefx.report import Row

_LAYOUTS = {op: layout for layout, op in LAYOUT_OPS.items()}


def adopt(gm: fx.GraphModule, ctx: PassContext) -> int:
    """Reads how each is stored and gives it a row of the report; returns how many there are."""
    packed = [node for node in gm.graph.nodes if node.target in PACKED_OPS]
    for number, node in enumerate(packed):
        _adopt(PackedNode(gm, node, ctx), f"packed {number}", ctx)
    return len(packed)


def _adopt(packed: PackedNode, key: str, ctx: PassContext) -> None:
    node = packed.node
    node.meta["sparsefx_packing"], node.meta["sparsefx_row"] = _packing(node), key
    out, in_ = packed.shape
    rows, vary = rows_of(packed.x)
    stored = packed.packed
    size = sum(tensor.nbytes for tensor in stored)
    # A pattern keeps something: of an all-zero weight, one element.
    density = max(packed.packing.density(stored, out * in_), 1 / (out * in_))
    ctx.rows[key] = Row(
        name=module_path(node),
        op="linear",
        graph=ctx.graph,
        shape=f"{out}x{in_} @ {rows}{'..' if vary else ''}",
        pattern=str(packed.packing.pattern(1 - density)),
        dense_bytes=out * in_ * packed.dtype.itemsize,
        stored_bytes=size,
        kept_bytes=size,
    )


def _packing(node: fx.Node) -> Packing:
    layout = _LAYOUTS[node.target]  # type: ignore[index]  # the target is one of PACKED_OPS
    kind, group = str(node.kwargs.get("kind", "")), int(str(node.kwargs.get("group", 0)))
    behind_bias = 2 + len(PARTS[layout])
    numbers = [int(str(each)) for each in node.args[behind_bias:-2]]
    match layout:
        case "nm":
            return Packing("nm", n=numbers[0], m=numbers[1], values=kind, group=group)
        case "block":
            return Packing("block", block=(numbers[0], numbers[1]), values=kind, group=group)
        case _:
            return Packing("bitmap", values=kind, group=group)
