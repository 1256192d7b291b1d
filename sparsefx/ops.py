"""The dialect: every sparsefx:: operator with its plain-PyTorch meaning, which is its definition.

The meaning is what runs where no kernel was chosen, and what every kernel is tested against (in
float64). Operators are registered with `Library.define/impl`: the call costs a third of
`@torch.library.custom_op` on CPU.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefx import epilogue as epilogues
from sparsefx.formats import PackedBitmap, PackedNM, unpack_bitmap, unpack_nm

_LIBRARY = torch.library.Library("sparsefx", "DEF")
_LIBRARY.define("mask(Tensor w, Tensor keep) -> Tensor")
_LIBRARY.define(
    "nm_linear(Tensor x, Tensor values, Tensor index, Tensor? bias, int n, int m, "
    "str epilogue, Tensor[] extras) -> Tensor"
)
_LIBRARY.define(
    "bitmap_linear(Tensor x, Tensor values, Tensor bits, Tensor row_ptr, Tensor? bias, "
    "str epilogue, Tensor[] extras) -> Tensor"
)


def mask(w: Tensor, keep: Tensor) -> Tensor:
    """`w` where `keep` (bool, same shape) is True, else 0; the gradient is masked by `keep`."""
    return torch.where(keep, w, torch.zeros((), dtype=w.dtype, device=w.device))


def nm_linear(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    epilogue: str,
    extras: Sequence[Tensor],
) -> Tensor:
    """epilogue(x W^T + bias) with W [out, in] stored as N:M.

    x [..., in]; values, index: `formats.PackedNM`; bias [out]; extras: operands of the epilogue,
    each of the result's shape. Returns [..., out], behind a gate [..., out / 2], contiguous, in the
    dtype of x.
    """
    weight = unpack_nm(PackedNM(values, index), n, m)
    return epilogues.apply(F.linear(x, weight, bias), epilogue, extras).contiguous()


def bitmap_linear(
    x: Tensor,
    values: Tensor,
    bits: Tensor,
    row_ptr: Tensor,
    bias: Tensor | None,
    epilogue: str,
    extras: Sequence[Tensor],
) -> Tensor:
    """epilogue(x W^T + bias) with W [out, in] stored as bitmap (`formats.PackedBitmap`).

    Shapes and result as `nm_linear`.
    """
    weight = unpack_bitmap(PackedBitmap(values, bits, row_ptr), x.shape[-1])
    return epilogues.apply(F.linear(x, weight, bias), epilogue, extras).contiguous()


def _mask_backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
    (keep,) = ctx.saved_tensors  # type: ignore[attr-defined]  # FunctionCtx is untyped there
    return mask(grad, keep), None


def _mask_save(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor
) -> None:
    ctx.save_for_backward(inputs[1])


def linear_output(x: Tensor, out_features: int) -> Tensor:
    """The fake result of a sparse linear: contiguous [..., out_features], x's dtype and device."""
    return x.new_empty((*x.shape[:-1], out_features))


_LIBRARY.impl("mask", mask, "CompositeExplicitAutograd")
_LIBRARY.impl("nm_linear", nm_linear, "CompositeExplicitAutograd")
_LIBRARY.impl("bitmap_linear", bitmap_linear, "CompositeExplicitAutograd")
torch.library.register_fake("sparsefx::mask", lambda w, keep: torch.empty_like(w), lib=_LIBRARY)
torch.library.register_fake(
    "sparsefx::nm_linear",
    lambda x, values, index, bias, n, m, epilogue, extras: linear_output(
        x, epilogues.features(values.shape[0], epilogue)
    ),
    lib=_LIBRARY,
)
torch.library.register_fake(
    "sparsefx::bitmap_linear",
    lambda x, values, bits, row_ptr, bias, epilogue, extras: linear_output(
        x, epilogues.features(bits.shape[0], epilogue)
    ),
    lib=_LIBRARY,
)
torch.library.register_autograd(
    "sparsefx::mask", _mask_backward, setup_context=_mask_save, lib=_LIBRARY
)

MASKED_OPS = frozenset({torch.ops.sparsefx.mask.default})
PACKED_OPS = frozenset(
    {torch.ops.sparsefx.nm_linear.default, torch.ops.sparsefx.bitmap_linear.default}
)
