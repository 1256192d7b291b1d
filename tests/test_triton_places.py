"""Bitmaps by stored value: vectors with an exact inverse, and numbers in Triton's interpreter."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsefx import formats
from sparsefx.codegen.triton import TritonLinear, forms, launch, places_pack
from sparsefx.codegen.triton.places_pack import CLASSES, VALUES, Places
from sparsefx.codegen.triton.variant import Settings, Variant
from sparsefx.target import LinearSpec
from tests.golden import assert_golden
from tests.triton_cases import Case, linear_spec, make, with_rows

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache folder of its own for each test, and no kernel left loaded from another one."""
    monkeypatch.setenv("SPARSEFX_CACHE", str(tmp_path))
    launch.load.cache_clear()
    yield
    launch.load.cache_clear()


def spec_of(dtype: torch.dtype, width: int, epilogue: str = "") -> LinearSpec:
    return replace(linear_spec("bitmap", dtype, epilogue), in_features=width)


def packed_of(weight: Tensor) -> Places:
    return places_pack.pack(formats.pack_bitmap(weight), weight.shape[1])


def storing(case: Case, weight: Tensor) -> Case:
    """The same linear with another weight, stored for the same kernel."""
    return replace(
        case, lowering=replace(case.lowering, packed=tuple(packed_of(weight))), weight=weight
    )


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 11, 16])
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_equals_the_meaning(dtype: torch.dtype, rows: int) -> None:
    case = make(with_rows(spec_of(dtype, 333), rows), form="places")
    case.check(case.launched())
    if dtype == BF16:
        case.check(case.run())  # the plain meaning, from what is stored


@pytest.mark.parametrize("epilogue", ["", "mul 0;relu;add 1"])
@pytest.mark.parametrize("settings", [(), (("split", 2),)], ids=str)
@pytest.mark.parametrize("rows", [17, 40])
def test_more_rows_than_it_was_made_for(rows: int, settings: Settings, epilogue: str) -> None:
    """guard="off" makes one kernel for the example's rows, and calls bring any number."""
    case = make(with_rows(spec_of(FP16, 333, epilogue), 4), (rows,), "places", settings)
    case.check(case.launched())


@pytest.mark.parametrize("width", [61, 256, 700])
@pytest.mark.parametrize(
    "settings", [(("lanes", 32),), (("lanes", 16), ("warps", 4), ("ahead", 1))], ids=str
)
def test_any_width_and_any_number_of_lanes(settings: Settings, width: int) -> None:
    case = make(spec_of(FP16, width), form="places", settings=settings)
    case.check(case.launched())


EPILOGUES = ("relu", "gelu", "gelu_tanh", "scale -0.5", "silu;mul 1;add 0")
GATES = ("gate_silu", "gate_gelu;scale 2.0;mul 1", "gate_relu;add 0")


@pytest.mark.parametrize("epilogue", EPILOGUES + GATES)
@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.filterwarnings(
    "ignore:overflow encountered in exp"
)  # sigmoid(-inf) is 0, as it should
def test_epilogues_of_whole_and_of_partial_sums(split: int, epilogue: str) -> None:
    settings: Settings = (("lanes", 8), ("split", split), ("ahead", split % 2))
    case = make(with_rows(spec_of(FP16, 200, epilogue), 5), form="places", settings=settings)
    first = case.launched()
    case.check(first)
    assert torch.equal(first, case.launched())


@pytest.mark.parametrize(("rows", "ahead"), [(1, 0), (1, 1), (5, 0), (9, 1)])
def test_ragged_rows(rows: int, ahead: int) -> None:
    """Empty ones, full ones, and values far apart, in one program."""
    spec = with_rows(spec_of(FP16, 1024), rows)
    case = make(spec, form="places", settings=(("ahead", ahead),))
    weight = torch.zeros_like(case.weight)
    weight[3] = case.x[0] + 1
    weight[4, ::300] = 2.0
    weight[21, [0, 255, 256, 511, 1023]] = -1.5
    weight[39, 1023] = 0.25
    case = storing(case, weight)
    case.check(case.launched())


@pytest.mark.parametrize("rows", [1, 4])
def test_nothing_is_stored(rows: int) -> None:
    case = make(with_rows(spec_of(FP16, 64), rows), form="places")
    case = storing(case, torch.zeros_like(case.weight))
    assert case.bias is not None
    assert torch.equal(case.launched(), case.bias.expand(rows, 40))


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("density", [0.001, 0.03, 0.3, 1.0])
def test_every_value_comes_back(dtype: torch.dtype, density: float) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(33, 40000, generator=generator).to(dtype)  # columns beyond 2^15
    weight *= torch.rand(weight.shape, generator=generator) < density
    weight[5] = 0
    stored = packed_of(weight)
    assert torch.equal(places_pack.unpack(stored, 40000), weight)
    assert stored.starts[-1] == len(stored.values) == len(stored.places) == len(stored.bases)


def test_bits_of_values_stay() -> None:
    every = torch.arange(1, 0x7F81).to(torch.int16).view(BF16)[None]  # up to infinity
    stored = packed_of(every)
    kept = stored.values.view(torch.int16).flatten()
    assert torch.equal(kept[kept != 0].sort()[0], every.view(torch.int16)[0])


@pytest.mark.parametrize(("density", "most"), [(0.3, 0.94), (0.2, 0.64), (0.1, 0.33)])
def test_bytes_of_a_dense_weight(density: float, most: float) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(64, 4096, generator=generator).half()
    weight *= torch.rand(weight.shape, generator=generator) < density
    stored = packed_of(weight)
    size = sum(tensor.nbytes for tensor in stored) / weight.numel()
    assert 3 * density < size < most + 0.01
    filled = int((weight != 0).sum()) / len(stored.values)
    assert filled == pytest.approx(places_pack.fill(density), rel=0.05)


def test_neighbouring_lanes_read_from_different_banks() -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.rand(16, 4096, generator=generator).half()
    weight *= torch.rand(weight.shape, generator=generator) < 0.2
    stored = packed_of(weight)
    classes = (stored.bases.long()[:, None] + stored.places) % CLASSES

    def turns(order: Tensor) -> float:
        """How often a bank is asked, at most, for one slot of eight neighbouring vectors."""
        lanes = order[: len(order) // CLASSES * CLASSES].view(-1, CLASSES, VALUES)
        asked = torch.nn.functional.one_hot(lanes, CLASSES).sum(1)
        return float(asked.amax(-1).float().mean())

    shuffled = torch.rand(classes.shape, generator=generator).argsort(1)
    assert turns(classes) < 0.8 * turns(classes.gather(1, shuffled))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "16-bit values, not torch.float32"),
        ({"rows": 17}, "more than 16"),
        ({"values": "int8"}, "int8 values are not stored by place"),
        ({"in_features": 65537}, "more than 65536"),
        ({"density": 0.7}, "as much memory as the dense weight"),
        ({"in_features": 4096, "out_features": 2**20, "density": 0.6}, "2^31"),
    ],
)
def test_declines_with_a_reason(change: dict[str, object], reason: str) -> None:
    spec = replace(spec_of(BF16, 1024), **change)  # type: ignore[arg-type]
    answer = TritonLinear("places").accepts(spec)
    assert answer is not None and reason in answer


@pytest.mark.parametrize("rows", [1, 8, 16])
@pytest.mark.parametrize("shape", [(4096, 4096), (14336, 4096), (4096, 14336), (40, 96)])
def test_tunings_are_few_distinct_and_legal(rows: int, shape: tuple[int, int]) -> None:
    spec = replace(spec_of(BF16, shape[1]), out_features=shape[0], rows=rows)
    kernels = TritonLinear("places").tunings(spec)
    assert 1 <= len(kernels) == len(set(kernels)) <= 8
    for kernel in kernels:
        assert isinstance(kernel, TritonLinear)
        forms.parse(Variant.of("places", spec, kernel.settings).handle)
    first = dict(kernels[0].settings)
    wide = rows * shape[1] > 16 * 4096  # x outgrows a multiprocessor's cache
    assert (first["split"] > 1) == wide


def test_text_of_the_kernel() -> None:
    case = make(spec_of(BF16, 96, "silu"), form="places")
    assert_golden("triton_places_bfloat16.py.txt", case.lowering.text)
