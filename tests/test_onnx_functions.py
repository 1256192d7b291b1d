"""The decompressors and packed linears as ONNX functions, against the dialect's own meaning."""

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from sparsefx import epilogue as epilogues
from sparsefx.codegen.onnx.functions import DOMAIN, VERSION, Variant, decompressor, linear
from sparsefx.codegen.onnx.storage import from_delta8, to_delta8
from sparsefx.formats import pack_bitmap, pack_nm
from sparsefx.spec import NM, Unstructured

DTYPES = {torch.float32: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT16}
KINDS = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2}
HEAVY = {"ScatterElements", "CumSum", "BitShift", "Expand", "Transpose", "Cast"}


def weight_nm(n: int, m: int, dtype: torch.dtype, seed: int, shape=(24, 48)) -> torch.Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (weight * NM(n, m).keep(weight.abs())).to(dtype)


def model(
    variant: Variant, stored: dict, inputs: dict, opset: int, **attributes
) -> onnx.ModelProto:
    """One packed linear on graph inputs x, extra0, ...; y is its result."""
    names = ["x", *stored, *(name for name in inputs if name != "x")]
    node = helper.make_node(
        variant.name,
        names,
        ["y"],
        domain=DOMAIN,
        overload=variant.overload,
        epilogue=variant.epilogue,
        **attributes,
    )
    kind = KINDS[next(iter(inputs.values())).dtype]
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info(n, kind, ["batch", t.shape[1]]) for n, t in inputs.items()],
        [helper.make_tensor_value_info("y", kind, ["batch", "out"])],
        [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in stored.items()],
    )
    functions = [decompressor(variant, opset), linear(variant, opset)]
    return helper.make_model(
        graph,
        functions=[ir.serde.serialize_function(function) for function in functions],
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=10,
    )


def run(proto: onnx.ModelProto, inputs: dict, optimised: Path) -> tuple[torch.Tensor, list[str]]:
    """What onnxruntime returns, and the operators that are left after its constant folding."""
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(optimised)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    (y,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    return torch.from_numpy(y), [node.op_type for node in onnx.load(optimised).graph.node]


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, what: object) -> None:
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error <= TOLERANCE[dtype], f"{what}: relative error {error:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 4), (2, 8), (4, 8), (4, 16), (15, 16)])
def test_nm_linear_is_its_meaning_and_folds(n, m, dtype, tmp_path):
    weight = weight_nm(n, m, dtype, seed=m)
    packed = pack_nm(weight, n, m)
    variant = Variant("NMLinear", n, m, DTYPES[dtype], has_bias=False, epilogue="")
    inputs = {"x": torch.randn(5, 48, generator=torch.Generator().manual_seed(1)).to(dtype)}
    stored = {"values": packed.values, "codes": packed.index}
    y, left = run(model(variant, stored, inputs, 20, n=n, m=m), inputs, tmp_path / "o.onnx")
    close(y, inputs["x"].double() @ weight.double().T, dtype, f"{n}:{m} seed {m}")
    assert left.count("MatMul") == 1
    assert not set(left) & (HEAVY - {"Cast"})


def test_nm_pads_the_last_byte_of_a_row(tmp_path):
    weight = weight_nm(
        1, 4, torch.float32, seed=3, shape=(3, 12)
    )  # 3 codes of 2 bits: 2 are padding
    packed = pack_nm(weight, 1, 4)
    variant = Variant("NMLinear", 1, 4, ir.DataType.FLOAT, has_bias=False, epilogue="")
    inputs = {"x": torch.eye(12)}
    stored = {"values": packed.values, "codes": packed.index}
    y, _ = run(model(variant, stored, inputs, 20, n=1, m=4), inputs, tmp_path / "o.onnx")
    assert torch.equal(y.T, weight)


@pytest.mark.parametrize("opset", [20, 24])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.995, 1.0])
def test_bitmap_linear_is_its_meaning_and_folds(sparsity, dtype, opset, tmp_path):
    weight = torch.randn(40, 70, generator=torch.Generator().manual_seed(7))
    keep = Unstructured(min(sparsity, 0.999)).keep(weight.abs()) & (sparsity < 1)
    weight = (weight * keep).to(dtype)
    packed = to_delta8(pack_bitmap(weight), 70)
    variant = Variant("BitmapLinear", 0, 0, DTYPES[dtype], has_bias=False, epilogue="")
    inputs = {"x": torch.eye(70).to(dtype)}
    proto = model(variant, packed._asdict(), inputs, opset, shape=(40, 70))
    y, left = run(proto, inputs, tmp_path / "o.onnx")
    assert torch.equal(y.T, weight), f"sparsity {sparsity}, seed 7"
    assert not set(left) & (HEAVY - {"Cast"})


EPILOGUES = ["relu", "silu", "gelu", "gelu_tanh", "scale -0.125", "scale 1e-05", "add 0", "mul 0"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("epilogue", [*EPILOGUES, "silu;mul 0", "scale 2.0;add 0;relu;mul 1"])
def test_epilogue_is_its_meaning(epilogue, dtype, tmp_path):
    weight = weight_nm(2, 4, dtype, seed=11)
    packed = pack_nm(weight, 2, 4)
    generator = torch.Generator().manual_seed(2)
    bias = torch.randn(24, generator=generator).to(dtype)
    variant = Variant("NMLinear", 2, 4, DTYPES[dtype], has_bias=True, epilogue=epilogue)
    extras = [torch.randn(5, 24, generator=generator).to(dtype) for _ in range(variant.extras)]
    inputs = {"x": torch.randn(5, 48, generator=generator).to(dtype)}
    inputs |= {f"extra{i}": extra for i, extra in enumerate(extras)}
    stored = {"values": packed.values, "codes": packed.index, "bias": bias}
    y, _ = run(model(variant, stored, inputs, 20, n=2, m=4), inputs, tmp_path / "o.onnx")
    linear_out = inputs["x"].double() @ weight.double().T + bias.double()
    wanted = epilogues.apply(linear_out, epilogue, [extra.double() for extra in extras])
    close(y, wanted, dtype, f"{epilogue} seeds 11, 2")


def test_every_epilogue_step_has_a_body():
    covered = {epilogue.split()[0] for epilogue in EPILOGUES}
    assert covered == {*epilogues.ACTIVATIONS, *epilogues.BINARY, "scale"}


def test_overloads_tell_bodies_apart():
    texts = ["", "scale 1.5", "scale 15.0", "scale -1.5", "scale 1e-05", "add 0", "mul 0", "relu"]
    variants = [
        Variant(name, n, m, dtype, bias, text)
        for name, n, m in (("NMLinear", 2, 4), ("NMLinear", 1, 4), ("BitmapLinear", 0, 0))
        for dtype in DTYPES.values()
        for bias in (False, True)
        for text in texts
    ]
    identifiers = {(variant.name, variant.overload) for variant in variants}
    assert len(identifiers) == len(variants)


@pytest.mark.parametrize("density", [0.0, 0.0005, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (3, 257), (64, 1030)])
def test_delta8_round_trip(density, shape):
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(shape, generator=generator)
    weight *= torch.rand(shape, generator=generator) < density
    packed = to_delta8(pack_bitmap(weight), shape[1])
    assert packed.gaps.dtype is torch.uint8
    assert packed.gaps.shape == packed.values.shape
    assert torch.equal(from_delta8(packed, shape), weight), f"density {density}, seed 5"


@pytest.mark.parametrize("distance", [1, 254, 255, 256, 509, 510, 511, 512, 766])
def test_delta8_bridges_long_gaps(distance):
    weight = torch.zeros(1, 1600)
    weight[0, [distance, 2 * distance]] = torch.tensor([1.0, 2.0])
    packed = to_delta8(pack_bitmap(weight), 1600)
    assert torch.equal(from_delta8(packed, (1, 1600)), weight)
    assert np.all(np.diff(packed.gaps.long().cumsum(0).numpy()) > 0)  # no position is written twice
