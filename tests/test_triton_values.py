"""Portable Triton kernels: blocks, and quantised values of every layout, in the interpreter."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsefx.codegen.triton import TritonLinear, forms, launch
from sparsefx.codegen.triton.variant import Settings, Variant
from sparsefx.target import LinearSpec
from tests.triton_cases import linear_spec, make, with_rows

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache folder of its own for each test, and no kernel left loaded from another one."""
    monkeypatch.setenv("SPARSEFX_CACHE", str(tmp_path))
    launch.load.cache_clear()
    yield
    launch.load.cache_clear()


def block_spec(block: tuple[int, int], dtype: torch.dtype, epilogue: str = "") -> LinearSpec:
    return LinearSpec("block", 128, 256, 0, 0, 0.4, dtype, True, epilogue, 7, True, block=block)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("block", [(16, 16), (64, 32), (32, 128)], ids=str)
def test_blocks_equal_the_meaning(block: tuple[int, int], dtype: torch.dtype, rows: int) -> None:
    case = make(with_rows(block_spec(block, dtype, "silu;add 0"), rows))
    case.check(case.launched())


@pytest.mark.parametrize("epilogue", ["gate_silu", "gate_relu;mul 0"])
def test_programs_share_a_row_of_blocks(epilogue: str) -> None:
    settings: Settings = (("rows", 16), ("split", 2))
    case = make(with_rows(block_spec((16, 16), FP16, epilogue), 20), settings=settings)
    first = case.launched()
    case.check(first)
    assert torch.equal(first, case.launched())


def test_the_longest_rows_of_blocks_start_first() -> None:
    case = make(block_spec((16, 16), FP16))
    _, _, row_ptr, order, *_ = case.lowering.packed
    counts = row_ptr.diff()[order.long()]
    assert (counts.diff() <= 0).all() and counts[0] > counts[-1]
    assert sorted(order.tolist()) == list(range(len(counts)))


@pytest.mark.parametrize("block", [(8, 8), (256, 64), (1, 16), (48, 48)], ids=str)
def test_odd_blocks_are_declined(block: tuple[int, int]) -> None:
    answer = TritonLinear("block").accepts(block_spec(block, FP16))
    assert answer is not None and f"{block[0]} x {block[1]} is no block" in answer


@pytest.mark.parametrize(("values", "group"), [("int8", 0), ("int4", 32), ("fp8", 64), ("int4", 0)])
@pytest.mark.parametrize(
    ("pattern", "dtype"),
    [("2:4", FP16), ("3:16", BF16), ("bitmap", FP16), ("bitmap", FP32)],
    ids=str,
)
def test_codes_equal_the_meaning(pattern: str, dtype: torch.dtype, values: str, group: int) -> None:
    spec = replace(linear_spec(pattern, dtype, "relu"), values=values, group=group)
    case = make(spec)
    case.check(case.launched())


@pytest.mark.parametrize("values", ["int8", "int4", "fp8"])
def test_codes_of_blocks(values: str) -> None:
    case = make(replace(block_spec((32, 64), FP16), values=values))
    case.check(case.launched())
    case.check(case.run())


def test_every_fp8_number_is_read_rightly() -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    every = bits.view(torch.float8_e4m3fn).float()
    case = make(replace(linear_spec("2:4", FP32, bias=False), values="fp8"))
    numbers = every[every.isfinite()][: 40 * 6].view(40, 6)
    values = case.lowering.packed[0].clone()
    values[:, :6] = numbers.to(torch.float8_e4m3fn).view(torch.int8)
    stored = (values, case.lowering.packed[1], torch.ones(40, 1))
    case = replace(case, lowering=replace(case.lowering, packed=stored))
    variant, form = forms.parse(case.lowering.handle)
    case = replace(case, weight=form.weight(variant, stored, 40, 96))
    assert set(numbers.unique().tolist()) <= set(case.weight.unique().tolist())
    case.check(case.launched())


@pytest.mark.parametrize("split", [2, 4])
@pytest.mark.parametrize("values", ["", "int4"])
def test_parts_of_a_bitmap_begin_at_their_ranks(values: str, split: int) -> None:
    spec = replace(linear_spec("bitmap", FP16, "gelu"), in_features=700, values=values)
    case = make(spec, settings=(("split", split),))
    assert case.lowering.packed[2].shape == (split, 40)
    case.check(case.launched())
    case.check(case.run())


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"values": "int8_dynamic"}, "does not quantise x"), ({"group": 48}, "groups of 48")],
)
@pytest.mark.parametrize("pattern", ["2:4", "bitmap"])
def test_declines_with_a_reason(pattern: str, change: dict[str, object], reason: str) -> None:
    spec = replace(linear_spec(pattern, FP16), **{"values": "int4", **change})  # type: ignore[arg-type]
    answer = TritonLinear(spec.layout).accepts(spec)
    assert answer is not None and reason in answer


@pytest.mark.parametrize("rows", [1, 16, 512])
@pytest.mark.parametrize("form", ["nm", "bitmap", "block"])
def test_tunings_are_few_distinct_and_legal(form: str, rows: int) -> None:
    spec = block_spec((64, 64), BF16) if form == "block" else linear_spec("2:4", BF16)
    if form == "bitmap":
        spec = linear_spec("bitmap", BF16)
    spec = replace(spec, out_features=4096, in_features=4096, rows=rows)
    kernels = TritonLinear(form).tunings(spec)
    assert 1 <= len(kernels) == len(set(kernels)) <= 8
    for kernel in kernels:
        assert isinstance(kernel, TritonLinear)
        forms.parse(Variant.of(form, spec, kernel.settings).handle)
