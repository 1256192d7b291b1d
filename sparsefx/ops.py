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
from sparsefx.packing import Packing
from sparsefx.quantise import quantised_rows

_LIBRARY = torch.library.Library("sparsefx", "DEF")
_LIBRARY.define("mask(Tensor w, Tensor keep) -> Tensor")
_TAIL = "str epilogue, Tensor[] extras, *, Tensor? scales=None, str kind='', int group=0) -> Tensor"
_LIBRARY.define(
    f"nm_linear(Tensor x, Tensor values, Tensor index, Tensor? bias, int n, int m, {_TAIL}"
)
_LIBRARY.define(
    f"bitmap_linear(Tensor x, Tensor values, Tensor bits, Tensor row_ptr, Tensor? bias, {_TAIL}"
)
_LIBRARY.define(
    "block_linear(Tensor x, Tensor values, Tensor columns, Tensor row_ptr, Tensor? bias, "
    f"int rows, int cols, {_TAIL}"
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
    *,
    scales: Tensor | None = None,
    kind: str = "",
    group: int = 0,
) -> Tensor:
    """epilogue(x W^T + bias) with W [out, in] stored as N:M.

    x [..., in]; values, index: `formats.PackedNM`; bias [out]; extras: operands of the epilogue,
    each of the result's shape. scales, kind, group: of quantised values (`packing.Packing`, where
    kind is `values`). Returns [..., out], behind a gate [..., out / 2], contiguous, in the dtype of
    x. With kind "int8_dynamic" each row of x is rounded to whole numbers and a scale first
    (`quantise.quantised_rows`).
    """
    packing = Packing("nm", n=n, m=m, values=kind, group=group)
    return _linear(x, packing, (values, index), scales, bias, epilogue, extras)


def bitmap_linear(
    x: Tensor,
    values: Tensor,
    bits: Tensor,
    row_ptr: Tensor,
    bias: Tensor | None,
    epilogue: str,
    extras: Sequence[Tensor],
    *,
    scales: Tensor | None = None,
    kind: str = "",
    group: int = 0,
) -> Tensor:
    """epilogue(x W^T + bias) with W [out, in] stored as bitmap (`formats.PackedBitmap`).

    Other arguments and result as `nm_linear`.
    """
    packing = Packing("bitmap", values=kind, group=group)
    return _linear(x, packing, (values, bits, row_ptr), scales, bias, epilogue, extras)


def block_linear(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    row_ptr: Tensor,
    bias: Tensor | None,
    rows: int,
    cols: int,
    epilogue: str,
    extras: Sequence[Tensor],
    *,
    scales: Tensor | None = None,
    kind: str = "",
    group: int = 0,
) -> Tensor:
    """epilogue(x W^T + bias) with W [out, in] stored as blocks of `rows` x `cols`.

    values, columns, row_ptr: `formats.PackedBlock`; other arguments and result as `nm_linear`.
    """
    packing = Packing("block", block=(rows, cols), values=kind, group=group)
    return _linear(x, packing, (values, columns, row_ptr), scales, bias, epilogue, extras)


def _linear(
    x: Tensor,
    packing: Packing,
    stored: tuple[Tensor, ...],
    scales: Tensor | None,
    bias: Tensor | None,
    epilogue: str,
    extras: Sequence[Tensor],
) -> Tensor:
    tensors = stored if scales is None else (*stored, scales)
    if packing.values == "int8_dynamic":
        weight = packing.unpack(tensors, x.shape[-1], torch.float64)
        codes, factors = quantised_rows(x)  # whole numbers: their products are exact in float64
        product = (F.linear(codes, weight) * factors + (0 if bias is None else bias)).to(x.dtype)
    else:
        product = F.linear(x, packing.unpack(tensors, x.shape[-1]), bias)
    return epilogues.apply(product, epilogue, extras).contiguous()


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
_LIBRARY.impl("block_linear", block_linear, "CompositeExplicitAutograd")
torch.library.register_fake("sparsefx::mask", lambda w, keep: torch.empty_like(w), lib=_LIBRARY)
torch.library.register_fake(
    "sparsefx::nm_linear",
    lambda x, values, index, bias, n, m, epilogue, extras, **_: linear_output(
        x, epilogues.features(values.shape[0], epilogue)
    ),
    lib=_LIBRARY,
)
torch.library.register_fake(
    "sparsefx::bitmap_linear",
    lambda x, values, bits, row_ptr, bias, epilogue, extras, **_: linear_output(
        x, epilogues.features(bits.shape[0], epilogue)
    ),
    lib=_LIBRARY,
)
torch.library.register_fake(
    "sparsefx::block_linear",
    lambda x, values, columns, row_ptr, bias, rows, cols, epilogue, extras, **_: linear_output(
        x, epilogues.features((row_ptr.shape[0] - 1) * rows, epilogue)
    ),
    lib=_LIBRARY,
)
torch.library.register_autograd(
    "sparsefx::mask", _mask_backward, setup_context=_mask_save, lib=_LIBRARY
)

MASKED_OPS = frozenset({torch.ops.sparsefx.mask.default})
LAYOUT_OPS = {
    "nm": torch.ops.sparsefx.nm_linear.default,
    "bitmap": torch.ops.sparsefx.bitmap_linear.default,
    "block": torch.ops.sparsefx.block_linear.default,
}
"""The packed linear of each layout."""

PACKED_OPS = frozenset(LAYOUT_OPS.values())
