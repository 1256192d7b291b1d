"""Quantised dense products that torch has: what a sparse quantised linear is compared with as well.

    int8, int4     weight only: x in bfloat16, the codes multiplied out inside
    int8_dynamic   x is quantised as well: by quantized::linear_dynamic on a CPU, _int_mm on a GPU
    fp8            both in e4m3 with a scale a row, _scaled_mm

They are information for the report, no bar: that is the dense layer of the model. Each leaves out
the bias, and each is run only if it computes the product of its codes and scales.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefx import devices, guard, timing
from sparsefx.errors import KernelRunFailed
from sparsefx.kernel_check import attempt
from sparsefx.quantise import LARGEST, codes_of, scales_of, values_of
from sparsefx.target import LinearSpec
from sparsefx.tuned import Tuned

INT4_GROUPS = (128, 64, 32, 256)  # columns a scale that torch's int4 products take
ERROR = 0.08  # largest |product - exact| over largest |exact|: x in 8 bits, float8 being the worst

Multiply = Callable[[Tensor], Tensor]
"""x [rows, in] times a weight, in x's dtype."""


@dataclass(frozen=True)
class Product:
    """A quantised dense product of one weight.

    operands: the weight as torch's operator takes it; `bound(operands)`, or a copy of them, is the
    call; weight: what the codes and scales stand for, [out, in].
    """

    name: str
    operands: timing.Copy
    bound: Callable[[timing.Copy], Multiply]
    weight: Tensor


Build = Callable[[Tensor, int], Product | None]
"""Of a weight [out, in] and the columns a scale (0: one a row); None where torch cannot."""


@torch.no_grad()
def measure(
    spec: LinearSpec, weight: Tensor, *, cache: Path, tuned: Tuned | None = None
) -> float | None:
    """Microseconds of the best quantised dense product of `weight` [out, in]; None: there is none.

    On the weight's device, by the rules and in the memory of `guard.measure`.
    """
    device, asked = weight.device, max(1, spec.rows)
    spec = _dense(replace(spec, rows=guard.runnable_rows(spec, device)))
    key = {
        "spec": repr(spec),
        "op": "quantised dense",
        "handle": "",
        "kernel": "torch",
        **devices.surroundings(device),
        "protocol": guard.PROTOCOL,
    }
    try:
        verdict = guard.answered(key, lambda: _best(spec, weight), cache, tuned)
    except KernelRunFailed:
        return None
    return verdict.sparse_us * asked / spec.rows


def _dense(spec: LinearSpec) -> LinearSpec:
    """What dense products know of it, so that weights of one shape share an answer."""
    bare = replace(spec, layout="dense", n=0, m=0, density=1.0, block=(0, 0))
    return replace(bare, has_bias=False, epilogue="", rows_vary=False)


def _best(spec: LinearSpec, weight: Tensor) -> guard.Verdict:
    """The fastest against dense. Raises KernelRunFailed where there is none."""
    x, _ = guard.inputs(spec, spec.rows, weight.device)
    found = [_timed(x, weight, each) for each in products(weight, spec.values, spec.group, x)]
    if not found:
        raise KernelRunFailed(kernel="quantised dense", rule="torch has no such product")
    return min(found, key=lambda verdict: verdict.sparse_us)


def _timed(x: Tensor, weight: Tensor, product: Product) -> guard.Verdict:
    def copies(most: int) -> list[tuple[Tensor, Multiply]]:
        stored = timing.rotating((weight, *product.operands), x.device, most)
        return [(dense, product.bound(tuple(operands))) for dense, *operands in stored]

    took = timing.paired_over(
        lambda copy: F.linear(x, copy[0]), lambda copy: copy[1](x), copies, x.device
    )
    return guard.Verdict(took.first_us, took.second_us, "measured", None, took.bound)


def products(weight: Tensor, kind: str, group: int, x: Tensor) -> Iterator[Product]:
    """Those of `weight` [out, in] that run here on `x` [rows, in] and give the right numbers.

    kind, group: as `LinearSpec.values` and `group`.
    """
    for build in _BUILDERS.get((weight.device.type, kind), ()):
        try:
            product = build(weight, group)
            if product is not None and error(product, x) < ERROR:
                yield product
        except (KernelRunFailed, RuntimeError):  # what this device or this build of torch has not
            continue


def error(product: Product, x: Tensor) -> float:
    """Largest difference from the product of its codes and scales with x, over the largest number.

    Raises KernelRunFailed.
    """
    result = attempt(product.name, lambda: product.bound(product.operands)(x))
    exact = F.linear(x.float(), product.weight.float())
    return float((result.float() - exact).abs().max() / exact.abs().max().clamp(min=1e-30))


def int8_weights(weight: Tensor, group: int = 0) -> Product | None:
    """x in bfloat16, a scale a row."""
    if weight.shape[1] % 32:  # the operator reads beyond the end of such rows
        return None
    codes, scales, exact = _by_rows(weight.bfloat16(), "int8")
    multiply = torch.ops.aten._weight_int8pack_mm.default

    def bound(operands: timing.Copy) -> Multiply:
        return lambda x: multiply(x.bfloat16(), *operands).to(x.dtype)

    return Product("int8 weights", (codes, scales.flatten()), bound, exact)


def _int8_dynamic(weight: Tensor, group: int = 0) -> Product | None:
    """x in float32 on a CPU, quantised by one scale and zero point."""
    if weight.dtype != torch.float32:
        return None
    codes, scales, exact = _by_rows(weight, "int8_dynamic")

    def bound(operands: timing.Copy) -> Multiply:
        packed = _prepacked(*operands)
        return lambda x: torch.ops.quantized.linear_dynamic(x, packed, False)

    return Product("int8 dynamic", (codes, scales.flatten()), bound, exact)


def _prepacked(codes: Tensor, scales: Tensor) -> torch.ScriptObject:
    zeros = torch.zeros(len(codes), dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "deprecated", without another way to it
        whole = torch._make_per_channel_quantized_tensor(codes, scales.double(), zeros, 0)
        packed: torch.ScriptObject = torch.ops.quantized.linear_prepack(whole, None)
    return packed


def _int8_both(weight: Tensor, group: int = 0) -> Product | None:
    """x quantised row by row; the operator takes more than 16 rows and multiples of 8."""
    codes, scales, exact = _by_rows(weight, "int8_dynamic")

    def bound(operands: timing.Copy) -> Multiply:
        codes, scales = operands
        return lambda x: _int8_product(x, codes, scales)

    return Product("int8 both", (codes, scales), bound, exact)


def _int8_product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    rows, factors = _quantised(x, "int8_dynamic")
    sums = torch._int_mm(rows.round().to(torch.int8), codes.t())
    return (sums * factors * scales.t()).to(x.dtype)


def _fp8(weight: Tensor, group: int = 0) -> Product | None:
    codes, scales, exact = _by_rows(weight.float(), "fp8")

    def bound(operands: timing.Copy) -> Multiply:
        codes, scales = operands
        return lambda x: _fp8_product(x, codes, scales)

    return Product("fp8", (codes, scales), bound, exact)


def _fp8_product(x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    rows, factors = _quantised(x, "fp8")
    result = torch._scaled_mm(
        rows.to(torch.float8_e4m3fn),
        codes.t(),
        scale_a=factors,
        scale_b=scales.t(),
        out_dtype=torch.bfloat16,
    )
    return result.to(x.dtype)


def int4_weights(weight: Tensor, group: int) -> Product | None:
    """x in bfloat16, a scale for each `group` columns, or for as many as torch takes."""
    fitting = [each for each in (group, *INT4_GROUPS) if each in INT4_GROUPS]
    fitting = [each for each in fitting if weight.shape[1] % each == 0]
    if not fitting or weight.shape[0] % 16:
        return None
    tile, short = (1, fitting[0]), weight.bfloat16()
    scales = scales_of(short, "int4", tile)
    codes = codes_of(short, scales, "int4", tile)
    factors = torch.stack([scales.t(), torch.zeros_like(scales.t())], -1).contiguous()
    packed, multiply = _int4_packed(codes.int() + 8)

    def bound(operands: timing.Copy) -> Multiply:
        codes, factors = operands
        return lambda x: multiply(x.bfloat16(), codes, fitting[0], factors).to(x.dtype)

    exact = values_of(codes, scales, tile, torch.float32)
    return Product("int4 weights", (packed, factors), bound, exact)


def _int4_packed(codes: Tensor) -> tuple[Tensor, Callable[..., Tensor]]:
    """Codes 0..15 (int32; -8..7 are meant) as the operator of their device takes them, and that."""
    aten = torch.ops.aten
    if codes.is_cuda:
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
        return aten._convert_weight_to_int4pack(pairs, 8), aten._weight_int4pack_mm
    return (
        aten._convert_weight_to_int4pack_for_cpu(codes, 1),
        aten._weight_int4pack_mm_for_cpu,
    )


def _by_rows(weight: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [out, in], scales [out, 1] and what they stand for, in the weight's dtype."""
    tile = (1, max(1, weight.shape[1]))
    scales = scales_of(weight, kind, tile)
    codes = codes_of(weight, scales, kind, tile)
    return codes, scales, values_of(codes, scales, tile, weight.dtype)


def _quantised(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """x over its scale, and that: float32 [rows, 1]."""
    factors = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / LARGEST[kind]
    return x / factors, factors


_BUILDERS: dict[tuple[str, str], tuple[Build, ...]] = {
    ("cpu", "int8"): (int8_weights,),
    ("cpu", "int8_dynamic"): (_int8_dynamic, int8_weights),
    ("cpu", "int4"): (int4_weights,),
    ("cpu", "fp8"): (_fp8,),
    ("cuda", "int8"): (int8_weights,),
    ("cuda", "int8_dynamic"): (_int8_both, int8_weights),
    ("cuda", "int4"): (int4_weights,),
    ("cuda", "fp8"): (_fp8,),
}
