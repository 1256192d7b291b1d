"""Roofline expressions: bytes are those of real packed tensors, symbols and numbers agree."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import sympy
import torch

from sparsefx import cost, devices
from sparsefx.errors import UnknownOption
from sparsefx.formats import pack_bitmap, pack_block, pack_nm
from sparsefx.packing import Packing
from sparsefx.quantise import LARGEST, rounded
from sparsefx.spec import NM, Block, Unstructured

A100 = devices.named("A100")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def random_sizes(seed: int) -> tuple[int, int, torch.dtype]:
    choose = random.Random(seed)
    return choose.randint(1, 70), choose.randint(1, 140), choose.choice(DTYPES)


@pytest.mark.parametrize("seed", range(12))
def test_bitmap_bytes_are_those_of_the_tensors(seed: int) -> None:
    out, width, dtype = random_sizes(seed)
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(seed))
    weight = weight.where(Unstructured(0.6).keep(weight.abs()), 0).to(dtype)
    packed = pack_bitmap(weight)
    density = sympy.Rational(packed.values.numel(), weight.numel())
    stated = cost.weight_bytes("bitmap", out, width, 0, 0, density, dtype)
    assert stated == sum(tensor.nbytes for tensor in packed), f"seed {seed}: {out} x {width}"


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (2, 8), (4, 8), (5, 16), (1, 16)])
@pytest.mark.parametrize("seed", range(4))
def test_nm_bytes_are_those_of_the_tensors(seed: int, n: int, m: int) -> None:
    out, groups, dtype = random_sizes(seed)
    weight = torch.randn(out, groups * m, generator=torch.Generator().manual_seed(seed))
    weight = weight.where(NM(n, m).keep(weight.abs()), 0).to(dtype)
    stated = cost.weight_bytes("nm", out, groups * m, n, m, n / m, dtype)
    packed = pack_nm(weight, n, m)
    assert stated == sum(tensor.nbytes for tensor in packed), f"seed {seed}: {out} x {groups * m}"


@pytest.mark.parametrize("seed", range(4))
def test_block_bytes_are_those_of_the_tensors(seed: int) -> None:
    high, wide, dtype = random_sizes(seed)
    weight = torch.randn(3 * high, 2 * wide, generator=torch.Generator().manual_seed(seed))
    weight = weight.where(Block(high, wide, 0.5).keep(weight.abs()), 0).to(dtype)
    packed = pack_block(weight, high, wide)
    stated = cost.weight_bytes(
        "block", *weight.shape, 0, 0, sympy.Rational(1, 2), dtype, block=(high, wide)
    )
    assert stated == sum(tensor.nbytes for tensor in packed), f"seed {seed}: {high} x {wide}"


@pytest.mark.parametrize("values", LARGEST)
@pytest.mark.parametrize(
    ("packing", "pattern", "shape"),
    [
        (Packing("nm", n=1, m=4), NM(1, 4), (3, 60)),
        (Packing("nm", n=2, m=4, group=32), NM(2, 4), (3, 80)),
        (Packing("bitmap", group=16), NM(2, 4), (3, 80)),
        (Packing("block", block=(3, 5)), Block(3, 5, 0.5), (6, 20)),
    ],
    ids=str,
)
def test_quantised_bytes_are_those_of_the_tensors(
    packing: Packing, pattern: NM | Block, shape: tuple[int, int], values: str
) -> None:
    packing = replace(packing, values=values)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).half()
    weight = weight.where(pattern.keep(weight.abs().float()), 0)
    weight[weight.abs() < 0.05] *= 8  # so that no code is 0, and the density is the pattern's
    weight = rounded(weight, values, packing.tile(shape[1]))
    tensors = packing.pack(weight)
    stated = cost.weight_bytes(
        packing.layout,
        *shape,
        packing.n,
        packing.m,
        sympy.nsimplify(packing.density(tensors, weight.numel())),
        weight.dtype,
        block=packing.block,
        values=values,
        group=packing.group,
    )
    assert stated == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("layout", cost.LAYOUTS)
def test_symbols_and_numbers_agree(layout: str) -> None:
    batch, length, out, in_ = sympy.symbols("B L out in_", positive=True, integer=True)
    rest = (2, 4, 0.5, torch.float16)
    symbolic = cost.linear_cost(layout, out, in_, batch * length, *rest, block=(16, 32))
    numeric = cost.linear_cost(layout, 96, 64, 3 * 17, *rest, block=(16, 32))
    by_symbols = symbolic.seconds(A100, B=3, L=17, out=96, in_=64)
    assert by_symbols == pytest.approx(numeric.seconds(A100), rel=1e-12)
    share = 0.5 if layout == "block" else 1  # kernels of blocks skip, the others do all the work
    assert symbolic.flops == 2 * batch * length * out * in_ * share


def test_seconds_of_a_known_case() -> None:
    # 4096 x 4096 half precision, 1 row: (2 * 4096 + 4096**2) * 2 bytes at 2.039 TB/s + 3 us
    small = cost.linear_cost("dense", 4096, 4096, 1, 0, 0, 1.0, torch.float16)
    assert small.seconds(A100) == pytest.approx((2 * 4096 + 4096**2) * 2 / 2.039e12 + 3e-6)
    # 8192 rows: 2 * 8192 * 4096**2 flops at 312 TFLOP/s
    large = cost.linear_cost("dense", 4096, 4096, 8192, 0, 0, 1.0, torch.float16)
    assert large.seconds(A100) == pytest.approx(2 * 8192 * 4096**2 / 312e12 + 3e-6)


@pytest.mark.parametrize("device", devices.GPUS, ids=lambda device: device.name)
@pytest.mark.parametrize("layout", cost.LAYOUTS)
def test_more_rows_never_cost_less(device: devices.Device, layout: str) -> None:
    rows = sympy.Symbol("rows", positive=True, integer=True)
    node = cost.linear_cost(layout, 512, 512, rows, 2, 4, 0.3, torch.bfloat16, block=(16, 16))
    times = [node.seconds(device, rows=2**power) for power in range(14)]
    assert times == sorted(times)


def test_a_denser_bitmap_costs_more_bytes() -> None:
    shares = (0.0, 0.2, 0.5, 0.9)
    bytes_ = [cost.weight_bytes("bitmap", 64, 64, 0, 0, share, torch.float32) for share in shares]
    assert bytes_ == sorted(set(bytes_))


@pytest.mark.parametrize(
    ("layout", "n", "m", "density"), [("nm", 2, 4, 0.5), ("bitmap", 0, 0, 0.3)]
)
@pytest.mark.parametrize("device", devices.GPUS, ids=lambda device: device.name)
def test_crossover_is_where_dense_draws_level(
    device: devices.Device, layout: str, n: int, m: int, density: float
) -> None:
    rest = (n, m, density, torch.float16)
    rows = cost.crossover_rows(layout, 1024, 2048, *rest, device)
    assert rows is not None and rows > 1

    def gap(at: int) -> float:
        dense = cost.linear_cost("dense", 1024, 2048, at, *rest).seconds(device)
        return dense - cost.linear_cost(layout, 1024, 2048, at, *rest).seconds(device)

    assert gap(rows - 1) > 0
    assert gap(rows) == pytest.approx(0, abs=1e-15)


def test_crossover_ends() -> None:
    size = (64, 64)
    full = cost.crossover_rows("bitmap", *size, 0, 0, 1.0, torch.float16, A100)
    assert full == 0, "a full bitmap is larger than dense, so dense is never slower"
    infinite = replace(A100, fp16=10**30)
    assert cost.crossover_rows("nm", *size, 2, 4, 0.5, torch.float16, infinite) is None


def test_attention_counts_both_products() -> None:
    node = cost.attention_cost(2, 8, 4, 16, 32, 64, torch.float16)
    assert node.flops == 2 * (2 * 2 * 8 * 16 * 32 * 64)
    assert node.bytes == 2 * (2 * 8 * 16 * 64) * 2 + 2 * (2 * 4 * 32 * 64) * 2  # Q, O and K, V
    length = sympy.Symbol("L", positive=True, integer=True)
    long = cost.attention_cost(1, 8, 8, length, length, 64, torch.float16)
    assert sympy.degree(long.flops, length) == 2
    assert sympy.degree(long.bytes, length) == 1


def test_a_symbol_without_value_is_named() -> None:
    length = sympy.Symbol("L", positive=True)
    node = cost.linear_cost("dense", 8, 8, length, 0, 0, 1.0, torch.float32)
    with pytest.raises(ValueError, match="L"):
        node.seconds(A100)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UnknownOption, match="nm"):
        cost.weight_bytes("csr", 8, 8, 0, 0, 0.5, torch.float32)
    with pytest.raises(UnknownOption, match="H200"):
        devices.named("TPU")


def test_cpu_is_probed_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probed = replace(devices.FALLBACK_CPU, fp32=123_456, bandwidth=789)
    calls: list[int] = []

    def probe() -> devices.Device:
        calls.append(1)
        return probed

    monkeypatch.setattr(devices, "_probe", probe)
    assert devices.named("cpu") == devices.FALLBACK_CPU
    assert not calls, "without a cache folder nothing is probed"
    assert devices.named("CPU", tmp_path) == probed
    assert devices.named("cpu", tmp_path) == probed
    assert len(calls) == 1
    (entry,) = (tmp_path / "devices").iterdir()
    again = tmp_path / "again"
    (again / "devices").mkdir(parents=True)
    (again / "devices" / entry.name).write_bytes(entry.read_bytes())
    assert devices.named("cpu", again) == probed
    assert len(calls) == 1, "another process reads the file"
    broken = tmp_path / "broken"
    (broken / "devices").mkdir(parents=True)
    (broken / "devices" / entry.name).write_bytes(entry.read_bytes().replace(b"789", b'"x"'))
    assert devices.named("cpu", broken) == probed
    assert len(calls) == 2, "a damaged file is probed again"


def test_the_real_probe_gives_positive_speeds() -> None:
    probed = devices._probe()
    assert min(probed.fp32, probed.fp16, probed.bf16, probed.bandwidth) > 0


def test_the_cpu_is_the_nearest_device_of_the_cpu() -> None:
    assert devices.nearest("cpu") == "cpu"
    assert devices.nearest("cuda") in {gpu.name for gpu in devices.GPUS}
