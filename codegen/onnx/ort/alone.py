"""A model of copies of one packed node, each with stored tensors of its own: what is timed."""

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedFunctionsPass

from sparsefx.codegen.onnx.functions import DOMAIN, VERSION
from sparsefx.codegen.onnx.ort.wanted import dense_shape
from sparsefx.devices import last_level_cache

COPIES = 16  # of a node in its file, at most
BYTES = 1 << 28  # of all their weights, unpacked, at most
_SEED = 0

Shapes = tuple[tuple[int, ...], ...]
"""Of the inputs of a node."""


def copies_of(node: ir.Node) -> int:
    """Of the node: enough to overflow the last-level cache, as far as memory allows."""
    out, width = dense_shape(node)
    size = max(1, 4 * out * width)
    return max(1, min(COPIES, BYTES // size, -(-4 * last_level_cache("cpu") // size)))


def inputs_of(node: ir.Node, shapes: Shapes) -> Iterator[tuple[str, np.ndarray]]:
    """x and the extras of the node by name, random."""
    random = np.random.default_rng(_SEED)
    for place, (value, shape) in enumerate(zip(node.inputs, shapes, strict=True)):
        assert value is not None
        if not _is_stored(value):
            assert value.dtype is not None
            yield f"input{place}", random.standard_normal(shape).astype(value.dtype.numpy())


def _is_stored(value: ir.Value) -> bool:
    return value.const_value is not None


def alone(model: ir.Model, node: ir.Node, copies: int, feed: Mapping[str, np.ndarray]) -> ir.Model:
    """A model of copies of the node on the same inputs, each with its own stored tensors."""
    inputs = {
        name: ir.Value(
            name=name,
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            shape=ir.Shape(array.shape),
        )
        for name, array in feed.items()
    }
    graph = ir.Graph(
        list(inputs.values()), [], nodes=[], opset_imports=dict(model.opset_imports), name="node"
    )
    for copy in range(copies):
        given = [
            _own(graph, value, copy) if value and _is_stored(value) else inputs[f"input{place}"]
            for place, value in enumerate(node.inputs)
        ]
        made = ir.node(
            node.op_type,
            given,
            attributes=dict(node.attributes),
            domain=DOMAIN,
            overload=node.overload,
            version=VERSION,
            name=f"node{copy}",
        )
        result = made.outputs[0]
        result.name, result.type = f"y{copy}", inputs["input0"].type
        graph.append(made)
        graph.outputs.append(result)
    alone = ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))
    RemoveUnusedFunctionsPass()(alone)
    return alone


def _own(graph: ir.Graph, value: ir.Value, copy: int) -> ir.Value:
    name = f"{value.name}.{copy}"
    if name not in graph.initializers:
        kept = ir.Value(
            name=name, type=value.type, shape=value.shape, const_value=value.const_value
        )
        graph.register_initializer(kept)
    return graph.initializers[name]
