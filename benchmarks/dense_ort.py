"""onnxruntime's dense linears: a chain of distinct layers in one session, as a model has them.

One session for each copy would be unfair to it: every session has threads of its own, asleep when
its turn comes, while those of the session before still spin. Measured so, a call cost up to three
times what a layer costs in a chain.
"""

import logging
import tempfile
from functools import partial
from pathlib import Path

import onnx
import onnxruntime
import torch
from onnx import ModelProto, TensorProto, compose, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from torch import Tensor

from benchmarks.turns import Side
from sparsefx.devices import last_level_cache

INT4_BLOCK = 32
NAMES = {"fp32": "fp32", "int8": "int8 dynamic", "int4": "int4 MatMulNBits"}
LAYERS = 24  # of a chain, at most
FILE_BYTES = 3 << 29  # of a chain: protobuf ends at 2 GiB
ACTIVATION_BYTES = 1 << 28  # of inputs and outputs of a chain together


class Chains:
    """The chains of one float32 weight [out, in], made when first asked for."""

    def __init__(self, weight: Tensor) -> None:
        self._out = weight.shape[0]
        self._models = onnx_models(weight)
        self._sessions: dict[tuple[str, int], onnxruntime.InferenceSession] = {}

    def side(self, value_type: str, x: Tensor) -> Side:
        """One call runs `layers(...)` copies of the linear, each on a copy of x [rows, in]."""
        model = self._models[value_type]
        of_layer = x.shape[0] * (x.shape[1] + self._out) * x.element_size()
        count = layers(model.ByteSize(), of_layer)
        if (value_type, count) not in self._sessions:
            whole = chain(model, count).SerializeToString()
            self._sessions[value_type, count] = session(whole)
        run = self._sessions[value_type, count]
        fed = {each.name: x.clone().numpy() for each in run.get_inputs()}
        return Side(f"onnxruntime {NAMES[value_type]}", [partial(run.run, None, fed)], count)


def onnx_models(weight: Tensor) -> dict[str, ModelProto]:
    """Value type -> an ONNX graph of x [rows, in] times the float32 weight [out, in]."""
    logging.getLogger().setLevel(logging.ERROR)  # the quantisers report progress as warnings
    plain = _matmul(weight)
    four = MatMulNBitsQuantizer(
        onnx.load_from_string(plain.SerializeToString()),
        block_size=INT4_BLOCK,
        is_symmetric=True,
        accuracy_level=4,
    )
    four.process()
    return {"fp32": plain, "int8": _int8(plain), "int4": four.model.model}


def _int8(plain: ModelProto) -> ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        own = onnx.load_from_string(plain.SerializeToString())
        quantize_dynamic(own, path, weight_type=QuantType.QInt8, per_channel=True)
        return onnx.load(path)


def _matmul(weight: Tensor) -> ModelProto:
    out, width = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="linear")],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", out])],
        [numpy_helper.from_array(weight.t().contiguous().numpy(), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def layers(weight_bytes: int, activation_bytes: int) -> int:
    """How many overflow the last-level cache four times, as far as memory allows."""
    wanted = -(-4 * last_level_cache("cpu") // weight_bytes)
    fitting = min(FILE_BYTES // weight_bytes, ACTIVATION_BYTES // activation_bytes, LAYERS)
    return max(1, min(wanted, fitting))


def chain(model: ModelProto, count: int) -> ModelProto:
    """`count` copies of the graph side by side, which a session runs one after the other."""
    whole = ModelProto()
    whole.CopyFrom(model)
    whole.ClearField("graph")
    whole.graph.name = model.graph.name
    for number in range(count):
        part = compose.add_prefix(model, f"{number}_", rename_functions=False).graph
        whole.graph.node.extend(part.node)
        whole.graph.initializer.extend(part.initializer)
        whole.graph.input.extend(part.input)
        whole.graph.output.extend(part.output)
    return whole


def session(model: bytes) -> onnxruntime.InferenceSession:
    """A session with as many threads as torch has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
