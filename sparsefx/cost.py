"""Roofline of a node, as sympy expressions in its symbolic shape.

seconds = max(flops / peak, bytes / bandwidth) + launch      (Williams et al. 2009, CACM 52(4))

Bytes count each operand once: input, stored weight, output. Kernels of N:M and bitmap "load sparse,
compute dense": they move fewer bytes and multiply as often as dense, so that flops are those of
dense. Kernels of blocks skip those of zeros: flops shrink with the density.
"""

from dataclasses import dataclass
from typing import TypeAlias

import sympy
import torch

from sparsefx.devices import Device
from sparsefx.errors import UnknownOption
from sparsefx.formats import index_bits
from sparsefx.quantise import LARGEST

Size: TypeAlias = int | sympy.Expr
Share: TypeAlias = int | float | sympy.Expr

LAYOUTS = ("dense", "nm", "bitmap", "block")

_VALUE_BYTES = {kind: sympy.Rational(1, 2) if kind == "int4" else 1 for kind in LARGEST}


@dataclass(frozen=True)
class Cost:
    """Work of one node: `flops` (a multiplication plus an addition are 2) and `bytes` moved."""

    flops: sympy.Expr
    bytes: sympy.Expr
    dtype: torch.dtype

    def roofline(self, device: Device) -> sympy.Expr:
        """Seconds on `device`, an expression in the symbols of the shape."""
        compute = self.flops / device.peak(self.dtype)
        memory = self.bytes / device.bandwidth
        return sympy.Max(compute, memory) + sympy.Rational(device.launch_ns, 10**9)

    def seconds(self, device: Device, **values: int) -> float:
        """Seconds on `device` where the symbol named `k` is `values["k"]`.

        Raises ValueError if a symbol of the shape is left without a value.
        """
        expression = self.roofline(device)
        missing = {str(symbol) for symbol in expression.free_symbols} - set(values)
        if missing:
            raise ValueError(f"the cost depends on {sorted(missing)}: pass a value for each")
        known = {symbol: values[str(symbol)] for symbol in expression.free_symbols}
        return float(expression.subs(known))


def linear_cost(
    layout: str,
    out: Size,
    in_: Size,
    rows: Size,
    n: int,
    m: int,
    density: Share,
    dtype: torch.dtype,
    *,
    block: tuple[int, int] = (0, 0),
    values: str = "",
    group: int = 0,
) -> Cost:
    """Cost of x [rows, in_] times a weight [out, in_] stored in one of LAYOUTS.

    `rows` is the product of x's leading sizes, such as B * L; sizes may be ints or sympy symbols.
    `n` and `m` are read by "nm", `density` (share of stored values) by "bitmap" and "block",
    `block` by "block"; `values` and `group` as in `target.LinearSpec`. The bias is left out: `out`
    values, the same in each layout. Raises UnknownOption for another layout.
    """
    ends = (sympy.sympify(rows) * in_ + sympy.sympify(rows) * out) * dtype.itemsize
    weight = weight_bytes(
        layout, out, in_, n, m, density, dtype, block=block, values=values, group=group
    )
    flops = 2 * sympy.sympify(rows) * out * in_
    if layout == "block":
        flops = flops * sympy.sympify(density)
    return Cost(flops, ends + weight, dtype)


def weight_bytes(
    layout: str,
    out: Size,
    in_: Size,
    n: int,
    m: int,
    density: Share,
    dtype: torch.dtype,
    *,
    block: tuple[int, int] = (0, 0),
    values: str = "",
    group: int = 0,
) -> sympy.Expr:
    """Bytes of a stored weight [out, in_], exactly those of the tensors that packing.py makes.

    But int4 codes of a bitmap, whose rows may be filled up by half a byte each.
    """
    out, in_ = sympy.sympify(out), sympy.sympify(in_)
    size = _VALUE_BYTES[values] if values else dtype.itemsize
    groups = sympy.ceiling(in_ / group) if group else 1
    scales = out * groups * dtype.itemsize if values else sympy.Integer(0)
    match layout:
        case "dense":
            return out * sympy.ceiling(in_ * size) + scales
        case "nm":
            kept = in_ * sympy.Rational(n, m)  # values of a row
            index = sympy.ceiling(kept * index_bits(m) / 8)
            return out * (sympy.ceiling(kept * size) + index) + scales
        case "bitmap":
            stored = sympy.sympify(density) * out * in_ * size
            return stored + out * sympy.ceiling(in_ / 8) + 4 * (out + 1) + scales  # row_ptr int32
        case "block":
            high, wide = block
            blocks = sympy.sympify(density) * out * in_ / (high * wide)
            each = high * sympy.ceiling(wide * size) + 4  # a column int32
            return blocks * (each + (dtype.itemsize if values else 0)) + 4 * (out / high + 1)
        case _:
            raise UnknownOption(option="layout", value=layout, known=", ".join(LAYOUTS))


def attention_cost(
    batch: Size,
    heads: Size,
    kv_heads: Size,
    queries: Size,
    keys: Size,
    head_dim: Size,
    dtype: torch.dtype,
) -> Cost:
    """Cost of dense, fused softmax(Q K^T / sqrt(d)) V, every query with every key.

    Scores stay on chip (Dao et al. 2022, arXiv 2205.14135), so only Q, K, V and the output move.
    The softmax's own arithmetic, about 5 / (4 head_dim) of the products', is left out.
    """
    return sparse_attention_cost(batch, heads, kv_heads, queries, keys, head_dim, dtype, 0)


def sparse_attention_cost(
    batch: Size,
    heads: Size,
    kv_heads: Size,
    queries: Size,
    keys: Size,
    head_dim: Size,
    dtype: torch.dtype,
    skipped: Share,
) -> Cost:
    """The same where a share `skipped` of the key tiles takes no part in P V.

    Q K^T is computed for all of them, so that K always moves and V by its kept share:

        flops = (2 + 2 (1 - skipped)) batch heads queries keys dim
    """
    batch, queries, keys = (sympy.sympify(size) for size in (batch, queries, keys))
    kept = 1 - sympy.sympify(skipped)
    flops = (2 + 2 * kept) * batch * heads * queries * keys * head_dim
    values = 2 * heads * queries + (1 + kept) * kv_heads * keys
    return Cost(flops, batch * values * head_dim * dtype.itemsize, dtype)


def crossover_rows(
    layout: str,
    out: int,
    in_: int,
    n: int,
    m: int,
    density: Share,
    dtype: torch.dtype,
    device: Device,
) -> int | None:
    """The number of rows from which on dense is at least as fast by the model; None for "never".

    layout: "nm" or "bitmap". Both do the same flops as dense, so they are level as soon as dense is
    bound by compute:

        rows f / peak >= (rows a + w) / bandwidth      f flops and a bytes a row, w weight bytes

    and at once if the packed weight is not smaller than the dense one.
    """
    dense = weight_bytes("dense", out, in_, n, m, density, dtype)
    if weight_bytes(layout, out, in_, n, m, density, dtype) >= dense:
        return 0
    row = linear_cost("dense", out, in_, 1, n, m, density, dtype)
    ends = row.bytes - dense
    slope = row.flops / device.peak(dtype) - ends / device.bandwidth
    if slope <= 0:
        return None
    return int(sympy.ceiling(dense / device.bandwidth / slope))
