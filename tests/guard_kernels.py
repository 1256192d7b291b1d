"""Right, wrong, slow and broken kernels for the guard to judge, behind one operator."""

import collections
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefx import epilogue, guard
from sparsefx.target import LINEAR_SCHEMA, LinearSpec, Lowering

SPEC = LinearSpec(
    layout="nm",
    out_features=24,
    in_features=16,
    n=2,
    m=4,
    density=0.5,
    dtype=torch.float32,
    has_bias=True,
    epilogue="",
    rows=6,
    rows_vary=False,
)
SEED = 7
FUSED = "mul 1;silu;add 0;scale 0.5"
CALLS: collections.Counter[str] = collections.Counter()
LIBRARY = torch.library.Library("sparsefx_test_guard", "DEF")
LIBRARY.define(LINEAR_SCHEMA)


def right(x: Tensor, weight: Tensor, bias: Tensor | None, extras: list[Tensor]) -> Tensor:
    return F.linear(x, weight, bias)


def slow(x: Tensor, weight: Tensor, bias: Tensor | None, extras: list[Tensor]) -> Tensor:
    time.sleep(0.002)
    return F.linear(x, weight, bias)


def wrong(x: Tensor, weight: Tensor, bias: Tensor | None, extras: list[Tensor]) -> Tensor:
    result = F.linear(x, weight, bias)
    result[-1, -1] += 0.1
    return result


def fused(x: Tensor, weight: Tensor, bias: Tensor | None, extras: list[Tensor]) -> Tensor:
    return epilogue.apply(F.linear(x, weight, bias), FUSED, extras)


def broken(x: Tensor, weight: Tensor, bias: Tensor | None, extras: list[Tensor]) -> Tensor:
    raise IndexError("tile 3 is out of range")


def rank_one(x: Tensor, weight: Tensor, bias: Tensor | None, extras: list[Tensor]) -> Tensor:
    return (x @ weight[0])[:, None].expand(-1, weight.shape[0]).contiguous()


Body = Callable[[Tensor, Tensor, Tensor | None, list[Tensor]], Tensor]
BODIES: dict[str, Body] = {
    "right": right,
    "slow": slow,
    "wrong": wrong,
    "fused": fused,
    "broken": broken,
    "rank_one": rank_one,
    "nan": lambda *args: right(*args) * math.nan,
    "narrow": lambda *args: right(*args)[:, :-1],
    "half": lambda *args: right(*args).half(),
}


def linear(
    x: Tensor,
    packed: list[Tensor],
    bias: Tensor | None,
    extras: list[Tensor],
    handle: str,
    features: int,
) -> Tensor:
    """The fake kernel: `handle` names its body; every call is counted."""
    CALLS[handle] += 1
    return BODIES[handle](x, packed[0], bias, extras)


LIBRARY.impl("linear", linear, "CompositeExplicitAutograd")


def lowering(handle: str, weight: Tensor, text: str = "text") -> Lowering:
    op = torch.ops.sparsefx_test_guard.linear.default
    return Lowering(op, (weight,), handle, weight.shape[0], text, path="")


def layer(spec: LinearSpec = SPEC) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    weight = torch.randn(spec.out_features, spec.in_features, generator=generator)
    return weight.to(spec.dtype), torch.randn(spec.out_features, generator=generator).to(spec.dtype)


def measure(
    handle: str,
    cache: Path,
    spec: LinearSpec = SPEC,
    weight: Tensor | None = None,
    text: str = "text",
) -> guard.Verdict:
    default, bias = layer(spec)
    weight = default if weight is None else weight
    bias_or_none = bias if spec.has_bias else None
    made = lowering(handle, weight, text)
    return guard.measure(spec, weight, bias_or_none, made, device="cpu", cache=cache)
