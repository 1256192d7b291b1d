"""The dense linears that a sparse one is compared with on CPU, as sides of `turns.in_turns`.

fp32    torch eager, Inductor, onnxruntime; torch.sparse CSR (of the pruned weight) beside them
bf16    torch eager, Inductor
int8    onnxruntime dynamic (per-channel weights, x quantised at run time), torch weight-only
int4    onnxruntime MatMulNBits, blocks of 32, accuracy level 4 (products in int8)
"""

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from torch import Tensor

from benchmarks.turns import Side
from sparsefx.devices import last_level_cache
from sparsefx.quantised_dense import int8_weights
from sparsefx.timing import rotating

INT4_BLOCK = 32
SESSIONS = 24  # at most, for a side of onnxruntime: each holds one copy of the weight

CPU = torch.device("cpu")


Linear = Callable[[Tensor, Tensor], object]


def compiled() -> Linear:
    """F.linear under Inductor: one graph for one row of x and one for all other numbers of rows."""
    torch.compiler.reset()  # guards of graphs of other shapes would be tried first

    def linear(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    inductor: Linear = torch.compile(linear)
    return inductor


def rivals(
    value_type: str, weight: Tensor, x: Tensor, inductor: Linear, models: dict[str, bytes]
) -> list[Side]:
    """The sides of one value type; `inductor`: `compiled()`; `models`: `onnx_models(weight)`."""
    return list(_rivals(value_type, weight, x, inductor, models))


def _rivals(
    value_type: str, weight: Tensor, x: Tensor, inductor: Linear, models: dict[str, bytes]
) -> Iterator[Side]:
    if value_type in ("fp32", "bf16"):
        yield over_copies("torch eager", partial(F.linear, x), weight)
        yield over_copies("Inductor", partial(inductor, x), weight)
    if value_type == "int8":
        yield from _int8_weights(weight, x.bfloat16())
    if value_type in models:
        names = {"fp32": "fp32", "int8": "int8 dynamic", "int4": "int4 MatMulNBits"}
        yield _session_side(f"onnxruntime {names[value_type]}", models[value_type], x)


def _int8_weights(weight: Tensor, x: Tensor) -> Iterator[Side]:
    product = int8_weights(weight)
    if product is not None:
        copies = rotating(product.operands, CPU, SESSIONS)
        yield Side("torch int8 weights", [partial(product.bound(copy), x) for copy in copies])


def over_copies(name: str, run: Callable[[Tensor], object], weight: Tensor) -> Side:
    """A side that calls `run` on one clone of the weight after the other."""
    copies = (copy for (copy,) in rotating((weight,), CPU, SESSIONS))
    return Side(name, [partial(run, copy) for copy in copies])


def csr(name: str, pruned: Tensor, x: Tensor) -> Side:
    """torch's own sparse product (MKL), float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "in beta state"
        sparse = pruned.to_sparse_csr()
    return Side(name, [lambda: torch.sparse.mm(sparse, x.t())])


def onnx_models(weight: Tensor) -> dict[str, bytes]:
    """Value type -> an ONNX file of x [rows, in] times the float32 weight [out, in]."""
    logging.getLogger().setLevel(logging.ERROR)  # the quantisers report progress as warnings
    plain = _matmul(weight).SerializeToString()
    four = MatMulNBitsQuantizer(
        onnx.load_from_string(plain), block_size=INT4_BLOCK, is_symmetric=True, accuracy_level=4
    )
    four.process()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        eight = onnx.load_from_string(plain)
        quantize_dynamic(eight, path, weight_type=QuantType.QInt8, per_channel=True)
        return {
            "fp32": plain,
            "int8": path.read_bytes(),
            "int4": four.model.model.SerializeToString(),
        }


def _matmul(weight: Tensor) -> onnx.ModelProto:
    out, width = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="linear")],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", out])],
        [numpy_helper.from_array(weight.t().contiguous().numpy(), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _session_side(name: str, model: bytes, x: Tensor) -> Side:
    wanted = -(-4 * last_level_cache("cpu") // len(model))
    sessions = [session(model) for _ in range(min(wanted, SESSIONS))]
    fed = {"x": x.numpy()}
    return Side(name, [partial(each.run, None, fed) for each in sessions])


def session(model: bytes) -> onnxruntime.InferenceSession:
    """A session with as many threads as torch has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
