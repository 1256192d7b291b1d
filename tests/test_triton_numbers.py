"""The generated Triton kernels compute what the dialect says, in Triton's interpreter."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsefx.codegen.triton import launch
from sparsefx.errors import DtypeMismatch, InvalidHandle
from sparsefx.formats import pack_bitmap
from tests.triton_cases import linear_spec, make, with_rows

PATTERNS = ("2:4", "1:4", "4:8", "2:8", "3:16", "bitmap")
EPILOGUES = (
    "relu",
    "silu",
    "gelu",
    "gelu_tanh",
    "scale -0.5",
    "add 0",
    "mul 0",
    "silu;mul 1;add 0",
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache folder of its own for each test, and no kernel left loaded from another one."""
    monkeypatch.setenv("SPARSEFX_CACHE", str(tmp_path))
    launch.load.cache_clear()
    yield
    launch.load.cache_clear()


@pytest.mark.parametrize("rows", [1, 7, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_equals_the_meaning(pattern: str, dtype: torch.dtype, rows: int) -> None:
    case = make(with_rows(linear_spec(pattern, dtype), rows))
    case.check(case.launched())


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("pattern", ["2:4", "bitmap"])
@pytest.mark.filterwarnings(
    "ignore:overflow encountered in exp"
)  # sigmoid(-inf) is 0, as it should
def test_every_epilogue_step(pattern: str, epilogue: str) -> None:
    case = make(linear_spec(pattern, torch.float32, epilogue))
    case.check(case.run())


@pytest.mark.parametrize("pattern", ["2:4", "bitmap"])
@pytest.mark.parametrize("epilogue", ["gate_silu", "gate_relu;add 0", "gate_gelu;scale 2.0;mul 1"])
def test_gates(pattern: str, epilogue: str) -> None:
    case = make(linear_spec(pattern, torch.float16, epilogue))
    assert case.lowering.features == 20
    case.check(case.launched())


@pytest.mark.parametrize("epilogue", ["", "silu;add 0", "gate_gelu"])
@pytest.mark.parametrize("split", [2, 8])
def test_partial_sums_are_added_in_order(split: int, epilogue: str) -> None:
    spec = replace(linear_spec("2:4", torch.float16, epilogue), in_features=196)
    case = make(spec, settings=(("columns", 32), ("split", split)))
    first = case.launched()
    case.check(first)
    assert torch.equal(first, case.launched())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_whole_tiles_take_the_unmasked_path(pattern: str) -> None:
    spec = replace(
        linear_spec(pattern, torch.float16, bias=False), in_features=128, out_features=64
    )
    case = make(spec)
    case.check(case.run())


@pytest.mark.parametrize("pattern", ["2:4", "bitmap"])
def test_leading_sizes_and_strides_of_x(pattern: str) -> None:
    case = make(linear_spec(pattern, torch.float32, "add 0"), shape=(3, 2))
    turned = replace(case, x=case.x.transpose(0, 1).contiguous().transpose(0, 1))
    assert not turned.x.is_contiguous()
    turned.check(turned.run())


@pytest.mark.parametrize("pattern", ["2:4", "bitmap"])
def test_no_rows(pattern: str) -> None:
    case = make(linear_spec(pattern, torch.float32), shape=(0, 5))
    assert case.run().shape == (0, 5, 40)


def test_relu_keeps_nan() -> None:
    case = make(linear_spec("2:4", torch.float32, "relu"))
    case.x[0, 0] = torch.nan
    assert case.run()[0].isnan().any() and not case.run()[1].isnan().any()


def test_a_bitmap_without_values() -> None:
    case = make(linear_spec("bitmap", torch.float32))
    nothing = torch.zeros(40, 77)
    packed = tuple(pack_bitmap(nothing))
    case = replace(case, lowering=replace(case.lowering, packed=packed), weight=nothing)
    assert case.bias is not None
    assert torch.equal(case.run(), case.bias.expand(7, 40))


def test_one_kernel_serves_all_shapes() -> None:
    small = make(linear_spec("2:4", torch.float32), settings=(("split", 2),))
    spec = replace(small.spec, out_features=100, in_features=256)
    large = make(spec, settings=(("split", 2),))
    assert small.lowering.handle == large.lowering.handle
    assert small.lowering.path == large.lowering.path
    large.check(large.run())


def test_kernel_is_generated_anew_where_the_cache_lacks_it() -> None:
    case = make(linear_spec("2:4", torch.float32))
    Path(case.lowering.path).unlink()
    case.check(case.run())
    assert Path(case.lowering.path).read_text() == case.lowering.text


def test_wrong_dtype_is_refused() -> None:
    case = make(linear_spec("2:4", torch.float32))
    with pytest.raises(DtypeMismatch, match="x is torch"):
        replace(case, x=case.x.half()).run()


@pytest.mark.parametrize(
    "handle",
    [
        "",
        "nm 2:5 float32 linear",
        "nm 4:4 float32 linear",
        "nm 2:4 int64 linear",
        "bitmap linear",
        "nm 2:4 float32 linear -> exec",
        "nm 2:4 float32 linear -> scale inf",
        "nm 2:4 float32 linear -> add -1",
        "nm 2:4 float32 linear -> add 0) or print(",
        "nm float32 linear",
        "bitmap 2:4 float32 linear",
        "exec 2:4 float32 linear",
        "nm 2:4 float32 linear warps=3",
        "nm 2:4 float32 linear import=4",
        "nm 2:4 float32 linear -> relu -> gate_silu",
    ],
)
def test_a_forged_handle_is_refused(handle: str) -> None:
    with pytest.raises(InvalidHandle):
        launch.load(handle)
