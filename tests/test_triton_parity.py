"""2:4 on parity slots: storage with an exact inverse, and numbers in Triton's interpreter."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch

from sparsefx.codegen.triton import TritonLinear, forms, launch, parity_pack
from sparsefx.codegen.triton.variant import Settings, Variant
from sparsefx.target import LinearSpec
from tests.golden import assert_golden
from tests.triton_cases import linear_spec, make, with_rows

BF16, FP16 = torch.bfloat16, torch.float16
PAIRS = torch.tensor(list(combinations(range(4), 2)))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cache folder of its own for each test, and no kernel left loaded from another one."""
    monkeypatch.setenv("SPARSEFX_CACHE", str(tmp_path))
    launch.load.cache_clear()
    yield
    launch.load.cache_clear()


def spec_of(dtype: torch.dtype, width: int, epilogue: str = "") -> LinearSpec:
    return replace(linear_spec("2:4", dtype, epilogue), in_features=width)


@pytest.mark.parametrize(("rows", "width"), [(1, 96), (7, 512), (17, 516), (64, 128)])
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_equals_the_meaning(dtype: torch.dtype, rows: int, width: int) -> None:
    case = make(with_rows(spec_of(dtype, width), rows), form="parity")
    case.check(case.launched())
    if dtype == BF16:
        case.check(case.run())  # the plain meaning, from what is stored


@pytest.mark.parametrize("epilogue", ["silu;add 0", "gate_silu", "gate_relu;mul 0"])
@pytest.mark.parametrize("split", [1, 4])
def test_epilogues_of_whole_and_of_partial_sums(split: int, epilogue: str) -> None:
    settings: Settings = (("out", 32), ("columns", 32), ("split", split))
    case = make(spec_of(FP16, 264, epilogue), form="parity", settings=settings)
    first = case.launched()
    case.check(first)
    assert torch.equal(first, case.launched())


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_every_pair_of_columns_and_every_bit_comes_back(dtype: torch.dtype) -> None:
    """All 16-bit patterns in either place of all six pairs, NaN and -0 too."""
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    bits = torch.stack((every, every.flip(0)), -1).expand(6, -1, 2).contiguous()
    columns = PAIRS[:, None, :].expand(6, len(every), 2)
    dense = torch.zeros(6, len(every), 4, dtype=torch.int16).scatter(-1, columns, bits)
    words, codes = parity_pack.pack(bits.view(dtype), columns)
    back = parity_pack.unpack(words, codes, dtype)
    assert torch.equal(back.view(torch.int16), dense.flatten(1))


def test_the_kernel_puts_every_pair_in_its_columns() -> None:
    """x is the identity, so that the result is W, in each group of a code word."""
    case = make(replace(spec_of(FP16, 48), out_features=6, has_bias=False), form="parity")
    order = (torch.arange(6)[:, None] + torch.arange(12)) % 6
    values = torch.arange(1, 6 * 24 + 1).view(6, 12, 2).to(FP16)
    dense = torch.zeros(6, 12, 4, dtype=FP16).scatter(-1, PAIRS[order], values).flatten(1)
    stored = parity_pack.pack(values, PAIRS[order])
    lowering = replace(case.lowering, packed=stored)
    case = replace(case, lowering=lowering, weight=dense, x=torch.eye(48, dtype=FP16))
    assert torch.equal(case.launched(), dense.t())


def test_nothing_is_stored_in_vain() -> None:
    stored = make(replace(spec_of(BF16, 512), out_features=64), form="parity").lowering.packed
    assert sum(tensor.nbytes for tensor in stored) == 1.125 * 64 * 512


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"n": 1}, "1:4 is not 2:4"),
        ({"n": 2, "m": 8}, "2:8 is not 2:4"),
        ({"dtype": torch.float32}, "not a word of 32 bits"),
        ({"rows": 65}, "more than 64"),
        ({"values": "int8"}, "int8 values have no half"),
    ],
)
def test_declines_with_a_reason(change: dict[str, object], reason: str) -> None:
    spec = replace(spec_of(BF16, 96), **change)  # type: ignore[arg-type]
    answer = TritonLinear("parity").accepts(spec)
    assert answer is not None and reason in answer


@pytest.mark.parametrize("rows", [1, 16, 64])
@pytest.mark.parametrize("shape", [(4096, 4096), (14336, 4096), (40, 96)])
def test_tunings_are_few_distinct_and_legal(rows: int, shape: tuple[int, int]) -> None:
    spec = replace(spec_of(BF16, shape[1]), out_features=shape[0], rows=rows)
    kernels = TritonLinear("parity").tunings(spec)
    assert 1 <= len(kernels) == len(set(kernels)) <= 8
    for kernel in kernels:
        assert isinstance(kernel, TritonLinear)
        forms.parse(Variant.of("parity", spec, kernel.settings).handle)


def test_text_of_the_kernel() -> None:
    case = make(spec_of(BF16, 96, "silu"), form="parity")
    assert_golden("triton_parity_2_4_bfloat16.py.txt", case.lowering.text)
