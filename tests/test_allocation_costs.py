"""What a pattern costs on a layer: parameters, bytes and time are those of the packed weight."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparsefx import devices
from sparsefx.cost import linear_cost
from sparsefx.errors import UnknownOption
from sparsefx.formats import pack_bitmap, pack_block, pack_nm
from sparsefx.packing import Packing
from sparsefx.patterns import NM, Block, Columns, Pattern, Rows, Unstructured
from sparsefx.prune.allocation.costs import cost, kept
from sparsefx.prune.allocation.layers import Layer
from sparsefx.quantise import rounded


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


PATTERNS = [
    NM(2, 4),
    NM(4, 8),
    NM(3, 16),
    NM(1, 2),
    Unstructured(0.5),
    Unstructured(0.77),
    Block(8, 4, 0.6),
    Block(16, 16, 0.6),
    Block(1, 16, 0.8),
    Rows(0.3),
    Columns(0.4),
]
CODED = [
    NM(2, 4, values="int4", group=32),
    NM(3, 16, values="int8"),
    Unstructured(0.5, values="fp8"),
    Block(1, 16, 0.5, values="int4"),
    Block(8, 4, 0.6, values="int8"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_bytes_and_parameters_are_those_of_the_packed_weight(
    pattern: Pattern, dtype: torch.dtype
) -> None:
    layer = Layer("w", "", (48, 80), dtype)
    weight = random(48, 80).to(dtype)
    weight = weight * pattern.keep(weight.abs().float())
    packed: tuple[Tensor, ...] = tuple(pack_bitmap(weight))
    if isinstance(pattern, NM) and pattern.m in (4, 8, 16):
        packed = tuple(pack_nm(weight, pattern.n, pattern.m))
    if isinstance(pattern, Block) and pattern.cols == 16:
        packed = tuple(pack_block(weight, pattern.rows, pattern.cols))
    assert kept(pattern, layer) == cost(pattern, layer, "parameters") == int((weight != 0).sum())
    size = sum(part.numel() * part.element_size() for part in packed)
    assert cost(pattern, layer, "bytes") == size < weight.numel() * dtype.itemsize


@pytest.mark.parametrize("pattern", CODED, ids=str)
def test_bytes_of_codes_are_those_of_the_packed_weight(pattern: Pattern) -> None:
    layer, weight = Layer("w", "", (48, 80), torch.bfloat16), random(48, 80)
    weight = (weight + weight.sign() * 9).bfloat16()  # no code of such weights is 0
    weight = weight * pattern.keep(weight.abs().float())
    weight = rounded(weight, pattern.values, pattern.tile(80))
    packed = Packing.of(pattern).pack(weight)
    size = sum(part.nbytes for part in packed)
    assert (
        cost(pattern, layer, "bytes")
        == size
        < cost(replace(pattern, values="", group=0), layer, "bytes")
    )


@pytest.mark.parametrize("pattern", [None, NM(15, 16), Unstructured(0.2)], ids=str)
def test_a_weight_that_is_not_worth_packing_costs_its_dense_bytes(pattern: Pattern | None) -> None:
    layer = Layer("w", "", (24, 80), torch.float16)
    assert cost(pattern, layer, "bytes") == 24 * 80 * 2


def test_time_is_the_rooflines_and_never_above_dense() -> None:
    layer, device = Layer("w", "", (4096, 4096), torch.float16), devices.named("A100")
    times = {rows: cost(NM(2, 4), layer, "time", device, rows) for rows in (1, 4096)}
    dense = {rows: cost(None, layer, "time", device, rows) for rows in (1, 4096)}
    work = linear_cost("nm", 4096, 4096, 1, 2, 4, 0.5, torch.float16)
    assert times[1] == math.ceil(work.seconds(device) * 1e9) < dense[1]
    assert times[4096] == dense[4096]
    tiny = Layer("w", "", (1, 4), torch.float16)
    assert cost(Unstructured(0.5), tiny, "time", device) == cost(None, tiny, "time", device)


def test_a_convolution_takes_its_dense_time_whatever_its_zeros() -> None:
    layer, device = Layer("w", "", (64, 64, 3, 3)), devices.named("cpu")
    assert cost(NM(2, 4), layer, "time", device) == cost(None, layer, "time", device)
    assert cost(NM(2, 4), layer, "bytes") < cost(None, layer, "bytes")


@pytest.mark.parametrize("budget", ["time", "flops"])
def test_a_budget_that_cannot_be_counted_is_refused(budget: str) -> None:
    with pytest.raises(UnknownOption, match="time with a device"):
        cost(NM(2, 4), Layer("wide", "0", (300, 100)), budget)
