"""Whether thresholds do anything on given inputs: a check that skips nothing has checked little."""

from collections.abc import Mapping

import torch
from torch import Tensor, fx

from sparsefx.attention.dense import dense_attention
from sparsefx.attention.operators import ATTENTION_OPS


def effect_of_thresholds(
    gm: fx.GraphModule, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> float | None:
    """The largest |O - O_dense| / |O_dense|, in the 2-norm, of a sparse attention on these inputs.

    None where the graph has no sparse attention. `gm` is as before when it returns.
    """
    found = {node: node.target for node in gm.graph.nodes if node.target in ATTENTION_OPS}
    if not found:
        return None
    changes: list[float] = []

    def run(op: torch._ops.OpOverload, *operands: object) -> Tensor:
        result: Tensor = op(*operands)
        names = (argument.name for argument in op._schema.arguments)
        values = dict(zip(names, operands, strict=True))
        seen = ("q", "k", "v", "mask", "is_causal", "scale", "window")
        dense = dense_attention(*(values[name] for name in seen))  # type: ignore[arg-type]  # schema
        changes.append(float((result - dense).norm() / dense.norm().clamp(min=1e-30)))
        return result

    for node, op in found.items():
        node.args, node.target = (op, *node.args), run
    gm.recompile()
    try:
        with torch.no_grad():
            gm(*args, **kwargs)
    finally:
        for node, op in found.items():
            node.args, node.target = node.args[1:], op
        gm.recompile()
    return max(changes)
