"""The attention kernels of one query: what they accept and how they are called."""

from dataclasses import dataclass

from sparsefx.attention.spec import DENOMINATORS, ORDERS, PLACEMENTS
from sparsefx.codegen.triton.attention.decode_library import (
    SKIP_SOFTMAX_DECODE,
    THETA_DECODE,
    theta_options,
)
from sparsefx.codegen.triton.attention.kernels import lowering, refusal
from sparsefx.codegen.triton.attention.variant import LARGEST_GROUP, AttentionVariant
from sparsefx.target import AttentionKernel, AttentionLowering, AttentionSpec


@dataclass(frozen=True)
class TritonSkipDecode:
    """Split-KV skip-softmax attention of one query: reads K once and V of kept tiles only."""

    name: str = "triton_skip_decode"
    method: str = "skip_softmax"

    def accepts(self, spec: AttentionSpec) -> str | None:
        """None for yes, or the reason for no."""
        reason = _refusal(spec, self.method)
        if reason is None and spec.order not in ORDERS:
            return f"{spec.order!r} is not an order of visits"
        return reason

    def lower(self, spec: AttentionSpec) -> AttentionLowering:
        """Prints the kernels into the cache folder; Triton compiles them at the first launch."""
        variant = AttentionVariant.of("decode_skip", spec, order=spec.order)
        return lowering(variant, SKIP_SOFTMAX_DECODE)


@dataclass(frozen=True)
class TritonThetaDecode:
    """Split-KV Top-Theta attention of one query: reads K once and gathers the kept rows of V.

    V-mean compensation needs the mean of all of V: with it every row of V is read, and nothing is
    saved over dense attention but by a caller who keeps that mean (`theta_decode.run_counted`).
    """

    name: str = "triton_theta_decode"
    method: str = "theta"

    def accepts(self, spec: AttentionSpec) -> str | None:
        """None for yes, or the reason for no."""
        reason = _refusal(spec, self.method)
        if reason is None and not _readable(spec.options):
            return f"{spec.options} are not topk, placement, denominator and v_mean"
        return reason

    def lower(self, spec: AttentionSpec) -> AttentionLowering:
        """Prints the kernels into the cache folder; Triton compiles them at the first launch."""
        _topk, placement, denominator, v_mean = spec.options
        options = theta_options(placement, denominator, v_mean == "True")
        variant = AttentionVariant.of("theta_decode", spec, **dict(options))
        return lowering(variant, THETA_DECODE)


DECODE_KERNELS: tuple[AttentionKernel, ...] = (TritonSkipDecode(), TritonThetaDecode())


def _refusal(spec: AttentionSpec, method: str) -> str | None:
    if spec.kv_heads and spec.heads // spec.kv_heads > LARGEST_GROUP:
        return f"more than {LARGEST_GROUP} query heads share a KV head"
    return refusal(spec, method, "decode")


def _readable(options: tuple[str, ...]) -> bool:
    known = (PLACEMENTS, DENOMINATORS, ("True", "False"))
    return len(options) == 4 and all(o in k for o, k in zip(options[1:], known, strict=True))
