"""What the Triton kernels accept, print and register, without running one."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparsefx.codegen.triton import TritonLinear, kernels, library
from sparsefx.codegen.triton.variant import Variant
from sparsefx.target import LinearSpec
from tests.golden import assert_golden
from tests.triton_cases import SEED, Case, linear_spec, make


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own for each test."""
    monkeypatch.setenv("SPARSEFX_CACHE", str(tmp_path))
    return tmp_path


def test_names() -> None:
    assert [kernel.name for kernel in kernels()] == [
        "triton_mma_sp_linear",
        "triton_parity_linear",
        "triton_nm_linear",
        "triton_places_linear",
        "triton_bitmap_linear",
        "triton_block_linear",
    ]


NM, BITMAP = linear_spec("2:4", torch.float16), linear_spec("bitmap", torch.float16)


@pytest.mark.parametrize(
    ("layout", "spec", "reason"),
    [
        ("nm", BITMAP, "stored as bitmap"),
        ("bitmap", NM, "stored as nm"),
        ("nm", replace(NM, dtype=torch.float64), "not torch.float64"),
        ("nm", replace(NM, in_features=98), "98 input features are not a multiple of m=4"),
        ("nm", replace(NM, n=4), "4:4 is not n:m"),
        ("nm", replace(NM, m=5), "2:5 is not n:m"),
        ("nm", replace(NM, out_features=0), "empty"),
        ("nm", replace(NM, epilogue="tanh"), "'tanh' is not one of"),
        ("nm", replace(NM, epilogue="scale inf"), "'scale inf' has no such operand"),
        ("bitmap", replace(BITMAP, out_features=2**31, in_features=8, density=0.5), "2^31"),
    ],
)
def test_declines_with_a_reason(layout: str, spec: LinearSpec, reason: str) -> None:
    answer = TritonLinear(layout).accepts(spec)
    assert answer is not None and reason in answer


def test_declines_where_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "installed", lambda: False)
    assert TritonLinear("nm").accepts(NM) == "Triton is not installed"


@pytest.mark.parametrize("pattern", ["2:4", "3:16", "bitmap"])
@pytest.mark.parametrize("epilogue", ["", "relu", "scale 0.1;add 1;mul 0;gelu_tanh"])
@pytest.mark.parametrize("bias", [False, True])
def test_handle_says_all(pattern: str, epilogue: str, bias: bool) -> None:
    spec = linear_spec(pattern, torch.bfloat16, epilogue, bias)
    variant = Variant.of(spec.layout, spec, (("warps", 8), ("split", 2)))
    assert Variant.parse(variant.handle) == variant
    assert variant.epilogue == epilogue


def test_text_of_a_kernel() -> None:
    case = make(linear_spec("2:4", torch.bfloat16, "silu;mul 0;scale 0.5"))
    first = case.lowering.text.splitlines()[0]
    steps = "bias -> silu -> mul 0 -> scale 0.5"
    assert first.endswith(f"nm 2:4 bfloat16 linear stages=3 split=1 -> {steps}")
    assert_golden("triton_nm_2_4_bfloat16.py.txt", case.lowering.text)


def test_text_and_path_are_stable(cache: Path) -> None:
    one, two = make(NM).lowering, make(NM).lowering
    assert (one.text, one.path, one.handle) == (two.text, two.path, two.handle)
    assert list((cache / "triton").iterdir()) == [Path(one.path)]


def test_a_damaged_cache_file_is_replaced() -> None:
    path = Path(make(NM).lowering.path)
    path.write_text("raise SystemExit")
    assert make(NM).lowering.text == path.read_text()


def test_lowering_does_not_import_triton(cache: Path) -> None:
    """Nor does it need it: templates are read as text."""
    program = (
        "import sys, unittest.mock; sys.modules['sparsefx.api'] = unittest.mock.MagicMock()\n"
        "import torch\n"
        "before = 'triton' in sys.modules\n"
        "from sparsefx.codegen.triton import emit, forms, kernels\n"
        "emit.write(*forms.parse('nm 2:4 float32 linear -> relu'))\n"
        "emit.write(*forms.parse('mma_sp 2:4 float16 linear'))\n"
        "assert before or 'triton' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


class Lowered(nn.Module):
    """A graph's packed linear after lowering."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case

    def forward(self, x: Tensor, extra: Tensor) -> Tensor:
        """The operator call, with a dense neighbour."""
        case = self.case
        lowering = case.lowering
        result = lowering.run(x, case.bias, [extra])
        return torch.tanh(result)


@pytest.mark.parametrize("pattern", ["2:4", "bitmap"])
def test_operator_is_registered_rightly(pattern: str) -> None:
    case = make(linear_spec(pattern, torch.float32, "add 0"))
    lowering = case.lowering
    rest = (case.bias, list(case.extras), lowering.handle, lowering.features)
    arguments = (case.x, list(lowering.packed), *rest)
    torch.library.opcheck(lowering.op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("pattern", ["2:4", "bitmap"])
def test_compiles_without_a_graph_break(pattern: str) -> None:
    case = make(linear_spec(pattern, torch.float32, "mul 0"))
    module = Lowered(case)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(case.x, *case.extras), module(case.x, *case.extras))


@pytest.mark.parametrize("pattern", ["2:4", "bitmap"])
def test_exports_with_dynamic_rows(pattern: str) -> None:
    case = make(linear_spec(pattern, torch.float32, "mul 0"))
    rows = torch.export.Dim("rows", min=2)
    program = torch.export.export(
        Lowered(case), (case.x, *case.extras), dynamic_shapes=({0: rows}, {0: rows})
    )
    longer = make(replace(case.spec, rows=11))
    result = program.module()(longer.x, *longer.extras)
    assert torch.equal(result, Lowered(longer)(longer.x, *longer.extras))


@pytest.mark.parametrize("pattern", ["2:4", "3:16", "bitmap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plain_meaning_where_nothing_can_launch(
    pattern: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model compiled for a GPU runs on a machine without one and without an interpreter."""
    monkeypatch.setattr(library, "interpreting", lambda: False)
    monkeypatch.setattr("sparsefx.codegen.triton.launch.linear", None)
    case = make(linear_spec(pattern, dtype, "mul 0"))
    assert case.x.dtype == dtype
    expected = case.meaning()
    error = (case.run().double() - expected).abs().max() / expected.abs().max()
    assert error < 0.02, f"seed {SEED}: {error:.2e}"
