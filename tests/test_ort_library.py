"""The library of kernels for onnxruntime: one file, run without it and with it, against PyTorch."""

import ctypes
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn
from torch.export import Dim

import sparsefx
from sparsefx.codegen.cpp import build as cpp_build
from sparsefx.codegen.cpp import isa
from sparsefx.codegen.onnx import check
from sparsefx.codegen.onnx.functions import DOMAIN, Variant, decompressor, linear
from sparsefx.codegen.onnx.ort import build, emit
from sparsefx.codegen.onnx.ort.wanted import wanted
from sparsefx.errors import ExportFailed, NotExportable, UnknownOption
from sparsefx.formats import pack_nm
from tests.golden import assert_golden
from tests.onnx_graphs import MLP, sparse_mlp

HERE = [each for each in isa.VECTOR_ISAS if each.present()]
SHAPES = [(2, 3, 32), (1, 1, 32), (7, 40, 32), (0, 3, 32)]
FREE = ({0: Dim.AUTO, 1: Dim.AUTO},)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """m.onnx and m.so: up is 2:4 with bias and relu, middle a bitmap with a residual."""
    path = tmp_path_factory.mktemp("ort")
    example = (torch.randn(2, 3, 32),)
    model, file = sparse_mlp(), path / "m.onnx"
    report = sparsefx.export_onnx(
        model, example, file, dynamic_shapes=FREE, library=path / "m.so", guard="off"
    )
    assert float(report.facts["largest |library - PyTorch|"]) < 1e-5
    assert "with it" in report.facts["ms a call"]
    assert "registered runs it sparse" in str(report)
    return path


def session(path: Path | bytes, library: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(path, options)


def operators_left(path: Path, library: Path | None) -> set[str]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(path.with_suffix(".left"))
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    if library is not None:
        options.register_custom_ops_library(str(library))
    onnxruntime.InferenceSession(path, options)
    return {node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node}


def agrees(library: Path, file: Path, model: nn.Module, shape: tuple[int, ...], bound: float):
    dtype = next(model.parameters()).dtype
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)
    (ours,) = session(file, library).run(None, {"x": x.numpy()})
    (stock,) = session(file).run(None, {"x": x.numpy()})
    with torch.no_grad():
        exact = model.double()(x.double()).numpy()
    model.to(dtype)
    assert ours.shape == stock.shape == exact.shape
    assert ours.dtype == stock.dtype
    if exact.size:
        scale = np.abs(exact).max()
        assert np.abs(ours - exact).max() <= bound * scale, f"{shape} {library.name}"
        assert np.abs(ours - stock).max() <= 2 * bound * scale, f"{shape} {library.name}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_library_and_bodies_compute_the_model(folder, shape):
    agrees(folder / "m.so", folder / "m.onnx", sparse_mlp(), shape, 1e-5)


def test_library_stands_in_for_the_bodies_and_a_stock_runtime_folds_them(folder):
    ours, stock = (operators_left(folder / "m.onnx", lib) for lib in (folder / "m.so", None))
    assert {"NMLinear", "BitmapLinear"} <= ours
    assert not stock & {"NMLinear", "BitmapLinear", "ScatterElements", "CumSum", "BitShift"}


@pytest.mark.parametrize("each", HERE, ids=lambda each: each.name)
def test_every_instruction_set_computes_the_model(folder, each, tmp_path):
    library = tmp_path / "one.so"
    build.build_library(wanted(ir.load(folder / "m.onnx")), library, (each,))
    agrees(library, folder / "m.onnx", sparse_mlp(), (5, 7, 32), 1e-5)


def test_half(tmp_path):
    model, file, library = sparse_mlp(torch.float16), tmp_path / "h.onnx", tmp_path / "h.so"
    example = (torch.randn(4, 32).half(),)
    free = ({0: Dim.AUTO},)
    sparsefx.export_onnx(model, example, file, dynamic_shapes=free, form="functions", check=False)
    build.build_library(wanted(ir.load(file)), library, HERE[:1])
    assert {"NMLinear", "BitmapLinear"} <= operators_left(file, library)
    for rows in (1, 9):
        agrees(library, file, model, (rows, 32), 4e-3)


def test_two_sessions_at_once(folder):
    sessions = [session(folder / "m.onnx", folder / "m.so") for _ in range(2)]
    feeds = [np.random.default_rng(i).standard_normal((8, 64, 32), "float32") for i in range(2)]
    alone = [s.run(None, {"x": x})[0] for s, x in zip(sessions, feeds, strict=True)]

    def hammer(i: int) -> bool:
        runs = (sessions[i % 2].run(None, {"x": feeds[i % 2]})[0] for _ in range(20))
        return all(np.array_equal(y, alone[i % 2]) for y in runs)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(hammer, range(4)))


def test_library_leaves_other_models_alone(folder, tmp_path):
    model, x = sparse_mlp(), torch.randn(4, 32)
    sparsefx.export_onnx(model, (x,), tmp_path / "plain.onnx", check=False)
    plain = tmp_path / "plain.onnx"  # form="standard": no node of ours
    (ours,) = session(plain, folder / "m.so").run(None, {"x": x.numpy()})
    (stock,) = session(plain).run(None, {"x": x.numpy()})
    assert np.array_equal(ours, stock)


def nm_file(
    codes: np.ndarray, values: np.ndarray, epilogue: str = "", constant: bool = True
) -> bytes:
    """One 2:4 linear with x [rows, width] free, and its codes as given."""
    variant = Variant("NMLinear", 2, 4, ir.DataType.FLOAT, has_bias=False, epilogue=epilogue)
    extras = [f"extra{i}" for i in range(variant.extras)]
    node = helper.make_node(
        "NMLinear",
        ["x", "values", "codes", *extras],
        ["y"],
        name="mlp.up",
        domain=DOMAIN,
        overload=variant.overload,
        n=2,
        m=4,
        epilogue=epilogue,
    )
    kind = onnx.TensorProto.FLOAT
    tensors = [numpy_helper.from_array(values, "values"), numpy_helper.from_array(codes, "codes")]
    inputs = ["x", *extras, *([] if constant else ["values"])]
    return helper.make_model(
        helper.make_graph(
            [node],
            "g",
            [helper.make_tensor_value_info(name, kind, ["a", f"b{name}"]) for name in inputs],
            [helper.make_tensor_value_info("y", kind, ["a", "out"])],
            tensors if constant else tensors[1:],
        ),
        functions=[ir.serde.serialize_function(f(variant, 20)) for f in (decompressor, linear)],
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, 1)],
        ir_version=10,
    ).SerializeToString()


@pytest.fixture(scope="module")
def packed() -> tuple[np.ndarray, np.ndarray]:
    weight = torch.zeros(8, 16)
    weight[:, ::4], weight[:, 1::4] = 1.0, 2.0
    values, codes = pack_nm(weight, 2, 4)
    return values.numpy(), codes.numpy()


@pytest.fixture(scope="module")
def add_library(tmp_path_factory: pytest.TempPathFactory, packed) -> Path:
    """Kernels for `nm_file` with epilogue "add 0"."""
    folder = tmp_path_factory.mktemp("add")
    (folder / "a.onnx").write_bytes(nm_file(packed[1], packed[0], "add 0"))
    specs = wanted(ir.load(folder / "a.onnx"))
    assert build.build_library(specs, folder / "a.so", (isa.PORTABLE,)) == 1
    return folder / "a.so"


def test_wrong_shapes_are_errors_that_name_the_node(add_library, packed):
    values, codes = packed
    runtime = session(nm_file(codes, values, "add 0"), add_library)
    x, extra = np.ones((3, 16), "float32"), np.ones((3, 8), "float32")
    (y,) = runtime.run(None, {"x": x, "extra0": extra})
    assert np.array_equal(y, np.full((3, 8), 4 * 3 + 1))
    with pytest.raises(Exception, match=r"NMLinear mlp.up: x \[3, 15\] must end in 16"):
        runtime.run(None, {"x": x[:, :15], "extra0": extra})
    with pytest.raises(Exception, match=r"mlp.up: extra \[3, 7\] is not of the result's shape"):
        runtime.run(None, {"x": x, "extra0": extra[:, :7]})
    with pytest.raises(Exception, match=r"mlp.up: extra \[2, 8\]"):
        runtime.run(None, {"x": x, "extra0": extra[:2]})
    assert runtime.run(None, {"x": x[:0], "extra0": extra[:0]})[0].shape == (0, 8)


def test_hostile_weights_are_refused_when_the_session_is_made(add_library, packed):
    values, codes = packed
    backwards = np.full_like(codes, 0b0001)  # columns 1, 0 of a group
    cases = {
        "do not ascend": nm_file(backwards, values, "add 0"),
        "do not fit": nm_file(codes[:, :-1], values, "add 0"),
        r"\[out, ...\]": nm_file(codes[:-1], values, "add 0"),
        "not groups of n": nm_file(codes, values[:, :-1].copy(), "add 0"),
        "must be a constant": nm_file(codes, values, "add 0", constant=False),
    }
    for rule, file in cases.items():
        with pytest.raises(Exception, match=rf"sparsefx::NMLinear mlp.up: .*{rule}"):
            session(file, add_library)


@pytest.mark.parametrize(
    ("gaps", "shape", "rule"),
    [
        ([0, 200, 200], (16, 16), "beyond the weight"),
        ([0, 0, 3], (16, 16), "a gap of 0"),
        ([0, 2, 3], (0, 16), "not that of a weight"),
        ([0, 2, 3], (-4, -64), "not that of a weight"),
        ([0, 2, 3], (2**20, 2**20), "not that of a weight"),
        ([0, 2], (16, 16), "of one length"),
    ],
    ids=str,
)
def test_hostile_bitmaps_are_refused(folder, gaps, shape, rule, tmp_path):
    proto = onnx.load(folder / "m.onnx")
    node = next(node for node in proto.graph.node if node.op_type == "BitmapLinear")
    node.attribute[0].CopyFrom(helper.make_attribute("shape", shape))
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    new = {node.input[1]: np.ones(3, "float32"), node.input[2]: np.array(gaps, "uint8")}
    for name, array in new.items():
        stored[name].CopyFrom(numpy_helper.from_array(array, name))
    del proto.graph.value_info[:]
    with pytest.raises(Exception, match=rf"sparsefx::BitmapLinear .*: .*{rule}"):
        session(proto.SerializeToString(), folder / "m.so")


def test_library_of_another_model_says_so(add_library, folder, packed):
    values, codes = packed
    for file, library in ((folder / "m.onnx", add_library), (nm_file(codes, values), add_library)):
        with pytest.raises(Exception, match="no kernel for it in this library"):
            session(file, library)


def test_old_onnxruntime_is_refused_by_name(folder):
    said: list[bytes] = []
    create = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(
        lambda _code, message: said.append(message) or 1
    )
    table = (ctypes.c_void_p * 1)(ctypes.cast(create, ctypes.c_void_p))
    get = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(
        lambda version: ctypes.addressof(table) if version <= 16 else None
    )
    words = ctypes.create_string_buffer(b"1.16.3")
    version = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.addressof(words))
    base = (ctypes.c_void_p * 2)(*(ctypes.cast(f, ctypes.c_void_p) for f in (get, version)))
    register = ctypes.CDLL(str(folder / "m.so")).RegisterCustomOps
    register.argtypes, register.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_void_p
    assert register(None, ctypes.addressof(base)) == 1
    assert said == [b"sparsefx: this library needs onnxruntime 1.17 or newer, and this is 1.16.3"]


def test_nothing_but_the_entry_is_visible(folder):
    line = ["nm", "--dynamic", "--defined-only", str(folder / "m.so")]
    names = subprocess.run(line, capture_output=True, text=True, check=True).stdout.split()[2::3]
    assert names == ["RegisterCustomOps"]


def test_instruction_sets_share_no_function(folder):
    """The linker keeps one copy of a weak function: it may be that of a newer processor."""
    kernels = emit.kernel_sources(wanted(ir.load(folder / "m.onnx")), isa.VECTOR_ISAS)
    for kernel in kernels:
        made = cpp_build.build_object("ort", kernel.text, kernel.isa.flags)
        line = ["nm", "--defined-only", str(made)]
        listed = subprocess.run(line, capture_output=True, text=True, check=True).stdout
        kinds = {row.split()[-2] for row in listed.splitlines()}
        assert not kinds & {"W", "V", "u", "T"}, f"{kernel.name} for {kernel.isa.name}:\n{listed}"


def test_choices_are_golden(folder):
    kernels = emit.kernel_sources(wanted(ir.load(folder / "m.onnx")), isa.VECTOR_ISAS)
    text = emit.operators_source(kernels, isa.VECTOR_ISAS)
    for number, kernel in enumerate(kernels):  # names are hashes of what is golden elsewhere
        text = text.replace(kernel.name, f"kernel_{number}")
    begin = text.index("namespace sparsefx {\nextern")
    end = text.index("};", text.index("CHOICES = {")) + 3
    assert_golden("ort_choices.cpp", text[begin:end])


def test_operators_compile_as_they_are(tmp_path):
    source = Path(emit.__file__).parent / "templates" / "operators.cpp"
    flags = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only")
    done = subprocess.run(["g++", *flags, str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_no_compiler_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ExportFailed, match=r"no g\+\+ on PATH.*No file was written.*leave out"):
        sparsefx.export_onnx(
            sparse_mlp(), (torch.randn(4, 32),), tmp_path / "m.onnx", library=tmp_path / "m.so"
        )
    assert files(tmp_path) == []


def test_failing_compiler_leaves_nothing(tmp_path, monkeypatch):
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "g++").write_text("#!/bin/sh\necho 'out of order' >&2\nexit 1\n")
    (tools / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    with pytest.raises(ExportFailed, match="did not compile: out of order"):
        sparsefx.export_onnx(
            sparse_mlp(), (torch.randn(4, 32),), tmp_path / "m.onnx", library=tmp_path / "m.so"
        )
    assert files(tmp_path) == ["tools"]


def test_wrong_numbers_leave_nothing(tmp_path, monkeypatch, folder):
    def other_session(path: Path, library: Path | None = None) -> onnxruntime.InferenceSession:
        return check.session(path if library is None else wrong, library)

    model = sparse_mlp()
    with torch.no_grad():
        model.up.bias += 1.0
    wrong = tmp_path / "wrong" / "m.onnx"
    x = torch.randn(2, 3, 32)
    sparsefx.export_onnx(model, (x,), wrong, dynamic_shapes=FREE, form="functions")
    monkeypatch.setattr("sparsefx.codegen.onnx.export.session", other_session)
    with pytest.raises(ExportFailed, match="onnxruntime with the library and PyTorch differ"):
        sparsefx.export_onnx(
            sparse_mlp(), (x,), tmp_path / "m.onnx", dynamic_shapes=FREE, library=tmp_path / "m.so"
        )
    assert files(tmp_path) == ["wrong"]


def test_refusals(tmp_path):
    x, file, library = torch.randn(4, 32), tmp_path / "m.onnx", tmp_path / "m.so"
    with pytest.raises(UnknownOption, match="form"):
        sparsefx.export_onnx(sparse_mlp(), (x,), file, form="standard", library=library)
    with pytest.raises(ExportFailed, match="is a folder"):
        sparsefx.export_onnx(sparse_mlp(), (x,), file, library=tmp_path)
    with pytest.raises(ExportFailed, match="the model's own path"):
        sparsefx.export_onnx(sparse_mlp(), (x,), file, library=file)
    torch.manual_seed(0)
    with pytest.raises(NotExportable, match="nothing to run"):
        sparsefx.export_onnx(MLP().eval(), (x,), file, library=library)
    with pytest.raises(NotExportable, match=r"DOUBLE.*float32 and float16"):
        sparsefx.export_onnx(sparse_mlp(torch.float64), (x.double(),), file, library=library)
    assert files(tmp_path) == []
