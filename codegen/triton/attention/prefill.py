"""Launches the attention kernels that have many queries; imports Triton."""

from dataclasses import dataclass

import torch
from torch import Tensor
from triton import cdiv, knobs
from triton.runtime import driver

from sparsefx.attention.operators import attention_output
from sparsefx.codegen.triton import loader
from sparsefx.codegen.triton.attention import tiles
from sparsefx.codegen.triton.attention.launch import (
    Loaded,
    Sample,
    head_factors,
    load,
    rows_contiguous,
)
from sparsefx.codegen.triton.attention.variant import AttentionVariant
from sparsefx.codegen.triton.form import Call


@dataclass(frozen=True)
class Form:
    """How a kernel is shaped for a device; it changes no result.

    defer: P V of a kept tile waits for the next kept tile; flat: the vote as tensor memory needs
    it; warps, stages: as Triton counts them.
    """

    defer: bool
    flat: bool
    warps: int
    stages: int


def form_for(variant: AttentionVariant, arch: int | str) -> Form:
    """The form for a device, arch 90 or "gfx942" (docs/attention_kernels.md).

    No register spills in 16-bit dtypes at heads up to 128 and tiles of 64 keys, without a mask.
    """
    rows, dim = variant.tile[0], variant.head_dim
    is_hopper, is_later = arch == 90, isinstance(arch, int) and arch > 90
    has_room = dim <= 64 or (dim <= 128 and rows >= 128)  # registers for P and V of one more tile
    is_wide = dim > (128 if is_hopper or is_later else 64) or variant.dtype == torch.float32
    return Form(
        defer=is_hopper and has_room and variant.dtype != torch.float32,
        flat=is_later,
        warps=8 if rows >= 128 or is_wide else 4,
        stages=3 if is_hopper and dim <= 128 else 2,
    )


def skip_softmax(
    handle: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    factor: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    """Skip-softmax attention by the kernel that `handle` names; see `operators`.

    factor: [heads]. Raises InvalidHandle, ShapeMismatch; KernelBuildFailed where Triton refuses it.
    """
    return _skip(handle, q, k, v, mask, factor, scale, window, None)


def computed_tiles(
    handle: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    factor: Tensor,
    scale: float,
    window: int,
    form: Form | None = None,
) -> tuple[Tensor, Tensor]:
    """`skip_softmax`, and how many key tiles it computed: int32 [batch, heads, row tiles]."""
    row_tiles = cdiv(q.shape[2], load(handle).variant.tile[0])
    counts = torch.zeros(*q.shape[:2], row_tiles, dtype=torch.int32, device=q.device)
    return _skip(handle, q, k, v, mask, factor, scale, window, counts, form), counts


def _skip(
    handle: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    factor: Tensor,
    scale: float,
    window: int,
    counts: Tensor | None,
    form: Form | None = None,
) -> Tensor:
    loaded = load(handle)
    out = attention_output(q, k, v)
    if not out.numel() or not k.shape[2]:
        return out.zero_()
    q, k, v = (rows_contiguous(x) for x in (q if scale >= 0 else -q, k, v))
    call = skip_plan(loaded, q, k, v, mask, factor, abs(scale), window, out, counts, form)
    loader.run(handle, loaded.module, call, q)
    return out


def skip_plan(
    loaded: Loaded,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    factor: Tensor,
    scale: float,
    window: int,
    out: Tensor,
    counts: Tensor | None,
    form: Form | None = None,
) -> Call:
    """The launch of a skip_prefill kernel; last dimensions contiguous, scale from 0 on."""
    form = form or form_for(loaded.variant, _arch())
    operands = (q, k, v, _bytes(mask), head_factors(factor, q), out, counts)
    numbers = (q.shape[2], k.shape[2], window, scale, *_strides(q, k, v, mask, out))
    options = {
        **loaded.constants,
        "DEFER": int(form.defer),
        "FLAT": int(form.flat),
        "num_warps": form.warps,
        "num_stages": form.stages,
    }
    return Call(_grid(loaded, q), (*operands, *numbers), options)


def block_attention(
    handle: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    keep: Tensor,
    scale: float,
    window: int,
) -> Tensor:
    """Attention over listed tiles by the kernel that `handle` names; see `operators`.

    keep: bool [batch or 1, heads or 1, row tiles, key tiles]. Raises InvalidHandle, or
    KernelBuildFailed where Triton refuses the kernel.
    """
    loaded = load(handle)
    variant = loaded.variant
    out = attention_output(q, k, v)
    if not out.numel() or not k.shape[2]:
        return out.zero_()
    listed, counts = tiles.lists(
        keep, q.shape[2], k.shape[2], variant.is_causal, window, *variant.tile
    )
    q, k, v = (rows_contiguous(x) for x in (q if scale >= 0 else -q, k, v))
    call = block_plan(loaded, q, k, v, mask, listed, counts, abs(scale), window, out)
    loader.run(handle, loaded.module, call, q)
    return out


def block_plan(
    loaded: Loaded,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    listed: Tensor,
    counts: Tensor,
    scale: float,
    window: int,
    out: Tensor,
) -> Call:
    """The launch of a block kernel on the lists of `tiles.lists`; last dimensions contiguous."""
    form = form_for(loaded.variant, _arch())
    operands = (q, k, v, _bytes(mask), listed, counts, out)
    batch, heads, row_tiles, key_tiles = listed.shape
    steps = (row_tiles * heads * (batch > 1), row_tiles * (heads > 1), key_tiles)
    numbers = (q.shape[2], k.shape[2], window, scale, *_strides(q, k, v, mask, out), *steps)
    options = {**loaded.constants, "num_warps": form.warps, "num_stages": form.stages}
    return Call(_grid(loaded, q), (*operands, *numbers), options)


def skip_sample(loaded: Loaded, sample: Sample) -> tuple[Call, ...]:
    """The launches of a skip_prefill call, to be compiled."""
    q, k, v = sample.q, sample.k, sample.v
    factor = torch.empty(q.shape[1], device="meta")
    out = attention_output(q, k, v)
    seen = (sample.scale, sample.window, out, None)
    return (skip_plan(loaded, q, k, v, sample.mask, factor, *seen),)


def block_sample(loaded: Loaded, sample: Sample) -> tuple[Call, ...]:
    """The launches of a block call, to be compiled."""
    q, k, v = sample.q, sample.k, sample.v
    rows, keys = loaded.variant.tile
    shape = (q.shape[0], q.shape[1], cdiv(q.shape[2], rows), cdiv(k.shape[2], keys))
    listed = torch.empty(shape, dtype=torch.int32, device="meta")
    counts = torch.empty(*shape[:3], 2, dtype=torch.int32, device="meta")
    seen = (sample.scale, sample.window, attention_output(q, k, v))
    return (block_plan(loaded, q, k, v, sample.mask, listed, counts, *seen),)


def _arch() -> int | str:
    if knobs.runtime.interpret:
        return "interpreter"
    arch: int | str = driver.active.get_current_target().arch
    return arch


def _grid(loaded: Loaded, q: Tensor) -> tuple[int, ...]:
    return (cdiv(q.shape[2], loaded.variant.tile[0]), q.shape[1], q.shape[0])


def _bytes(mask: Tensor | None) -> Tensor | None:
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask


def _strides(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor) -> list[int]:
    shape = (*q.shape[:3], k.shape[2])
    masked = (0, 0, 0, 0) if mask is None else mask.expand(shape).stride()
    return [*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *masked, *out.stride()[:3]]
