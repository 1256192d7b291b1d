"""2:4 and 1:4 on sparse tensor cores: storage, and numbers by a machine for inline PTX."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsefx.codegen.triton import TritonLinear, forms, hardware, launch, mma_sp_pack
from sparsefx.codegen.triton.form import Problem
from sparsefx.codegen.triton.variant import Settings, Variant
from sparsefx.target import LinearSpec
from tests.golden import assert_golden
from tests.triton_cases import linear_spec, make, with_rows

BF16, FP16 = torch.bfloat16, torch.float16
DIRECT: Settings = (("deep", 2), ("direct", 1))
ORDERED: Settings = (("slabs", 2), ("tall", 2), ("deep", 1), ("split", 2), ("direct", 0))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache folder of its own for each test, and no kernel left loaded from another one."""
    monkeypatch.setenv("SPARSEFX_CACHE", str(tmp_path))
    launch.load.cache_clear()
    yield
    launch.load.cache_clear()


def spec_of(pattern: str, dtype: torch.dtype, width: int, epilogue: str = "") -> LinearSpec:
    return replace(linear_spec(pattern, dtype, epilogue), in_features=width)


@pytest.mark.parametrize("settings", [DIRECT, ORDERED], ids=("direct", "ordered"))
@pytest.mark.parametrize(("rows", "dtype"), [(1, FP16), (13, BF16), (33, FP16)], ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_equals_the_meaning(
    pattern: str, rows: int, dtype: torch.dtype, settings: Settings
) -> None:
    case = make(with_rows(spec_of(pattern, dtype, 520), rows), form="mma_sp", settings=settings)
    case.check(case.launched())
    case.check(case.run())  # the plain meaning, from what is stored


@pytest.mark.parametrize("pattern", ["2:8", "1:8", "2:16", "1:16"])
def test_sparser_patterns_are_contained(pattern: str) -> None:
    case = make(spec_of(pattern, BF16, 272), form="mma_sp")
    case.check(case.launched())
    case.check(case.run())


@pytest.mark.parametrize("settings", [DIRECT, ORDERED], ids=("direct", "ordered"))
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_whole_blocks_take_the_unmasked_path(pattern: str, settings: Settings) -> None:
    case = make(spec_of(pattern, FP16, 512), form="mma_sp", settings=settings)
    case.check(case.launched())


@pytest.mark.parametrize(
    ("group", "dtype"), [(0, BF16), (64, FP16), (128, BF16), (512, FP16)], ids=str
)
@pytest.mark.parametrize("values", ["int8", "int4"])
def test_codes_are_rebuilt_in_registers(values: str, dtype: torch.dtype, group: int) -> None:
    spec = replace(spec_of("2:4", dtype, 520, "relu"), values=values, group=group)
    case = make(spec, form="mma_sp", settings=DIRECT)
    case.check(case.launched())
    case.check(case.run())


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # sigmoid(-inf) is 0
@pytest.mark.parametrize("settings", [DIRECT, ORDERED], ids=("direct", "ordered"))
@pytest.mark.parametrize(
    "epilogue", ["gate_silu", "gate_gelu;add 0", "gate_gelu_tanh;scale 0.5", "gate_relu;mul 0"]
)
def test_gates(epilogue: str, settings: Settings) -> None:
    case = make(spec_of("2:4", FP16, 264, epilogue), form="mma_sp", settings=settings)
    assert case.lowering.features == 20
    case.check(case.launched())


@pytest.mark.parametrize(("kept", "values"), [(1, ""), (2, ""), (2, "int8"), (2, "int4")])
def test_fragment_order_has_an_exact_inverse(kept: int, values: str) -> None:
    generator = torch.Generator().manual_seed(3)
    shape = (32, 128, kept)
    columns = torch.rand((32, 128, 4), generator=generator).argsort(-1)[..., :kept].sort(-1).values
    if values:
        most = {"int8": 127, "int4": 7}[values]
        stored = torch.randint(-most, most + 1, shape, generator=generator, dtype=torch.int8)
    else:
        stored = torch.randn(shape, generator=generator).to(BF16)
    groups = mma_sp_pack.Groups(stored, columns)
    words = mma_sp_pack.fragments(groups, values)
    assert torch.equal(mma_sp_pack.unfragment(words, kept, values, stored.dtype), stored)
    if kept == 2:
        back = mma_sp_pack.unmetadata(mma_sp_pack.metadata(columns))
    else:
        back = mma_sp_pack.unsingle_metadata(mma_sp_pack.single_metadata(columns))
    assert torch.equal(back, columns)


@pytest.mark.parametrize(
    ("pattern", "values", "bytes_each"),
    [("2:4", "", 1.125), ("1:4", "", 0.625), ("2:4", "int8", 0.625), ("2:4", "int4", 0.375)],
)
def test_nothing_is_stored_in_vain(pattern: str, values: str, bytes_each: float) -> None:
    """Bytes a dense weight, without scales."""
    spec = replace(spec_of(pattern, BF16, 512), out_features=64, values=values, group=0)
    stored = make(spec, form="mma_sp").lowering.packed
    assert sum(tensor.nbytes for tensor in stored[:2]) == bytes_each * 64 * 512


@pytest.mark.parametrize("offset", [1, 4])
def test_x_may_start_anywhere(offset: int) -> None:
    """A slice of a row, as one token's part of a larger tensor, is contiguous at any address."""
    case = make(with_rows(spec_of("2:4", FP16, 264), 1), form="mma_sp", settings=DIRECT)
    case = replace(case, x=torch.cat((case.x.new_zeros(1, offset), case.x), 1)[:, offset:])
    assert case.x.is_contiguous() and case.x.data_ptr() % 16
    case.check(case.launched())
    y = case.x.new_empty(1, 40)
    problem = Problem(case.x, case.lowering.packed, case.bias, (), y, 40)
    (call,) = launch.load(case.lowering.handle).calls(problem)
    read = call.arguments[:3]  # by 128 bits: what Triton knows of addresses is how lanes are laid
    assert not any(t.data_ptr() % 16 for t in read if isinstance(t, torch.Tensor))


def test_inf_in_a_row_stays_in_it() -> None:
    case = make(spec_of("2:4", FP16, 520), form="mma_sp", settings=DIRECT)
    case.x[2] = torch.inf
    result = case.launched()
    assert result[:2].isfinite().all() and not result[2].isfinite().any()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"n": 4, "m": 8}, "not contained in 2:4"),
        ({"dtype": torch.float32}, "do not compute torch.float32"),
        ({"in_features": 100}, "not a multiple of 8"),
        ({"rows": 65}, "more than 64"),
        ({"values": "fp8"}, "not rebuilt in registers"),
        ({"values": "int4", "group": 48}, "groups of 48"),
    ],
)
def test_declines_with_a_reason(change: dict[str, object], reason: str) -> None:
    spec = replace(spec_of("2:4", BF16, 96), **change)  # type: ignore[arg-type]
    answer = TritonLinear("mma_sp").accepts(spec)
    assert answer is not None and reason in answer


@pytest.mark.parametrize(
    ("hip", "capability", "accepted"),
    [(None, (9, 0), True), (None, (8, 0), True), (None, (7, 5), False), ("6.4", (9, 4), False)],
)
def test_asks_the_device(
    hip: str | None, capability: tuple[int, int], accepted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    answer = hardware.lacks(hardware.SPARSE_TENSOR_CORES)
    assert (answer is None) == accepted and (answer is None or "GPU has no sparse" in answer)


@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 4096), (14336, 4096), (40, 96)])
def test_tunings_are_few_distinct_and_legal(rows: int, shape: tuple[int, int]) -> None:
    spec = replace(spec_of("2:4", BF16, shape[1]), out_features=shape[0], rows=rows)
    kernels = TritonLinear("mma_sp").tunings(spec)
    assert 1 <= len(kernels) == len(set(kernels)) <= 8
    for kernel in kernels:
        assert isinstance(kernel, TritonLinear)
        forms.parse(Variant.of("mma_sp", spec, kernel.settings).handle)


def test_text_of_the_kernel() -> None:
    spec = replace(spec_of("2:4", BF16, 96, "silu"), values="int4", group=128)
    assert_golden("triton_mma_sp_2_4_int4.py.txt", make(spec, form="mma_sp").lowering.text)
