"""Never slower, for convolutions: a kernel is chosen only where it beats dense F.conv2d."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefx import guard, timing
from sparsefx.convolutions import ConvLowering, ConvSpec, Taps
from sparsefx.guard import FLOPS_LIMIT, Verdict
from sparsefx.kernel_check import attempt, compare
from sparsefx.target import LinearSpec
from sparsefx.tuned import Tuned

_LAYOUTS = (torch.contiguous_format, torch.channels_last)
_SEED = 0


def measure(
    spec: ConvSpec,
    weight: Tensor,
    taps: Taps,
    bias: Tensor | None,
    lowering: ConvLowering,
    *,
    device: torch.device | str,
    cache: Path,
    tuned: Tuned | None = None,
) -> Verdict:
    """Times `lowering` against dense F.conv2d with `weight` [out, in, rows, columns] and `bias`.

    Dense has the memory format that it is faster in. The kernel gets and gives channels last, which
    costs it a conversion at either end: that is what it costs between dense convolutions, to which
    Inductor gives channels last on CPU. Answers are kept as those of `guard.measure`. Raises
    KernelRunFailed.
    """
    device = torch.device(device)
    work = 2 * spec.pixels * spec.taps * spec.out_channels // max(1, spec.batch)
    images = min(max(1, spec.batch), max(1, FLOPS_LIMIT[device.type] // max(1, work)))
    asked, spec = max(1, spec.batch), replace(spec, batch=images)
    rounded = replace(spec, density=round(spec.density, 2))
    key = guard.question(repr((rounded, bias is not None)), lowering, device)
    verdict = guard.answered(
        key, lambda: _measured(spec, weight.detach(), taps, bias, lowering), cache, tuned
    )
    return guard.scaled(verdict, asked / images)


def model(spec: ConvSpec, device_name: str, *, cache: Path | None = None) -> Verdict:
    """Predicts both times by the roofline, as those of a bitmap linear on unfolded pixels."""
    linear = LinearSpec(
        layout="bitmap",
        out_features=spec.out_channels,
        in_features=spec.taps,
        n=0,
        m=0,
        density=spec.density,
        dtype=spec.dtype,
        has_bias=False,
        epilogue="",
        rows=spec.pixels,
        rows_vary=False,
    )
    return guard.model(linear, device_name, cache=cache)


@dataclass(frozen=True)
class _Case:
    """A convolution beside its dense self, on random images."""

    spec: ConvSpec
    lowering: ConvLowering
    bias: Tensor | None
    x: Tensor

    def dense(self, weight: Tensor) -> Tensor:
        return F.conv2d(self.x, weight, self.bias, self.spec.stride, self.spec.padding)

    def sparse(self, taps: tuple[Tensor, ...]) -> Tensor:
        shape, last = list(self.spec.shape), True
        rest = (shape, self.spec.stride, self.spec.padding, last, self.lowering.handle)
        result: Tensor = self.lowering.op(self.x, list(taps), self.bias, *rest)
        return result


@torch.no_grad()
def _measured(
    spec: ConvSpec, weight: Tensor, taps: Taps, bias: Tensor | None, lowering: ConvLowering
) -> Verdict:
    device = weight.device
    generator = torch.Generator(device).manual_seed(_SEED)  # the global generator is the user's
    sizes = (spec.batch, spec.in_channels, spec.height, spec.width)
    x = torch.randn(sizes, generator=generator, device=device, dtype=spec.dtype)
    plain, last = (
        _Case(spec, lowering, bias, x.contiguous(memory_format=layout)) for layout in _LAYOUTS
    )
    weights = [weight.contiguous(memory_format=layout) for layout in _LAYOUTS]
    pairs = list(zip((plain, last), weights, strict=True))
    dense, of_dense = min(pairs, key=lambda pair: timing.least_us(lambda: pair[0].dense(pair[1])))
    result = attempt(lowering.handle, lambda: last.sparse(taps))
    error, fault = compare(result, dense.dense(of_dense), spec.dtype)
    took = timing.paired(
        lambda copy: dense.dense(copy[0]),
        lambda copy: last.sparse(copy[1:]),
        (of_dense, *taps),
        device,
    )
    return Verdict(took.first_us, took.second_us, "measured", error, took.bound, fault)
