"""The attention kernels of the CUDA target that have many queries: what they accept."""

from dataclasses import dataclass

from torch._ops import OpOverload

from sparsefx.attention.spec import ORDERS, TILES
from sparsefx.codegen.triton.attention import emit, library
from sparsefx.codegen.triton.attention.variant import MASKS, AttentionVariant
from sparsefx.codegen.triton.library import installed
from sparsefx.codegen.triton.variant import DTYPES
from sparsefx.target import AttentionKernel, AttentionLowering, AttentionSpec

LARGEST_HEAD = 256


@dataclass(frozen=True)
class TritonSkipPrefill:
    """Skip-softmax attention with many queries (arXiv 2512.12087); see skip_prefill_template.py."""

    name: str = "triton_skip_prefill"
    method: str = "skip_softmax"

    def accepts(self, spec: AttentionSpec) -> str | None:
        """None for yes, or the reason for no."""
        if spec.order not in ORDERS:
            return f"{spec.order!r} is not an order of visits"
        return refusal(spec, self.method, "prefill")

    def lower(self, spec: AttentionSpec) -> AttentionLowering:
        """Prints the kernel into the cache folder; Triton compiles it at the first launch."""
        variant = AttentionVariant.of("skip_prefill", spec, order=spec.order)
        return lowering(variant, library.SKIP_PREFILL)


@dataclass(frozen=True)
class TritonBlock:
    """Attention over listed key tiles; see block_template.py."""

    name: str = "triton_block_attention"
    method: str = "block"

    def accepts(self, spec: AttentionSpec) -> str | None:
        """None for yes, or the reason for no."""
        return refusal(spec, self.method, spec.phase)

    def lower(self, spec: AttentionSpec) -> AttentionLowering:
        """Prints the kernel into the cache folder; Triton compiles it at the first launch."""
        variant = AttentionVariant.of("block", spec)
        return lowering(variant, library.BLOCK)


def refusal(spec: AttentionSpec, method: str, phase: str) -> str | None:
    """Why a tiled Triton kernel of this method and phase cannot compute a node, or None."""
    if (spec.method, spec.phase) != (method, phase):
        return f"the kernel computes {method} {phase}, not {spec.method} {spec.phase}"
    if not installed():
        return "Triton is not installed"
    if spec.dtype not in DTYPES.values():
        return f"the kernel computes {', '.join(DTYPES)}, not {spec.dtype}"
    if not 0 < spec.head_dim <= LARGEST_HEAD:
        return f"heads of {spec.head_dim}, the kernel has at most {LARGEST_HEAD}"
    if spec.mask not in MASKS:
        return f"{spec.mask!r} is not a kind of mask"
    if method != "theta" and any(size not in TILES for size in spec.tile):
        return f"tiles of {spec.tile}, the kernel has {TILES}"
    if not spec.kv_heads or spec.heads % spec.kv_heads:
        return f"{spec.heads} heads are not a multiple of {spec.kv_heads} KV heads"
    return None


def lowering(variant: AttentionVariant, op: OpOverload) -> AttentionLowering:
    """How a graph calls the kernel of a variant, whose text is then in the cache folder."""
    path, text = emit.write(variant)
    return AttentionLowering(op, variant.handle, text, str(path))


PREFILL_KERNELS: tuple[AttentionKernel, ...] = (TritonSkipPrefill(), TritonBlock())
