"""Sparse attentions for the ONNX tests: exact inputs, and models of one attention node."""

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx import helper
from torch import Tensor

from sparsefx.codegen.onnx.attention_functions import AttentionVariant, attention
from tests.attention_cases import Sizes, skipping_inputs

KINDS = {
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bool: onnx.TensorProto.BOOL,
    torch.int64: onnx.TensorProto.INT64,
}


def exact(x: Tensor) -> Tensor:
    """x in multiples of 1/16, so that float32 scores have no rounding and no decision can flip."""
    return x.mul(16).round().div(16)


def exact_inputs(sizes: Sizes, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """`skipping_inputs` whose scores are exact in float32; float64."""
    q, k, v = skipping_inputs(sizes, seed)
    return exact(q), exact(k), v


def run_node(
    variant: AttentionVariant,
    inputs: Mapping[str, Tensor | None],
    attributes: Mapping[str, int | float | str],
    opset: int = 20,
) -> Tensor:
    """One call of the operator's function in onnxruntime; None is an input left out."""
    given = {name: value for name, value in inputs.items() if value is not None}
    node = helper.make_node(
        variant.name,
        [name if value is not None else "" for name, value in inputs.items()],
        ["y"],
        domain="sparsefx",
        overload=variant.overload,
        **attributes,
    )
    graph = helper.make_graph(
        [node],
        "one_attention",
        [
            helper.make_tensor_value_info(name, KINDS[value.dtype], [None] * value.dim())
            for name, value in given.items()
        ],
        [helper.make_tensor_value_info("y", KINDS[inputs["q"].dtype], [None] * 4)],
    )
    model = helper.make_model(
        graph,
        functions=[ir.serde.serialize_function(attention(variant, opset))],
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("sparsefx", 1)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    feed: dict[str, np.ndarray] = {name: value.numpy() for name, value in given.items()}
    return torch.from_numpy(session.run(None, feed)[0])
