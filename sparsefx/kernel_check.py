"""A kernel run once and compared with what it stands for, before it is timed."""

from collections.abc import Callable

import torch
from torch import Tensor

from sparsefx.errors import KernelRunFailed

# Largest |sparse - dense| over largest |dense|. Both sum in float32 in another order and round the
# result once, and once more for each step of the epilogue: a few units of the dtype's last place.
ERROR_BOUNDS = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 2e-2,
}


def attempt(handle: str, run: Callable[[], Tensor]) -> Tensor:
    """What the kernel `handle` returns, its work on a GPU finished. Raises KernelRunFailed."""
    try:
        result = run()
        if result.is_cuda:
            torch.cuda.synchronize(result.device)
    except Exception as cause:  # a generated kernel may fail in any way; the model must still run
        rule = f"{type(cause).__name__}: {cause}"
        raise KernelRunFailed(kernel=handle, rule=rule) from cause
    return result


def compare(result: Tensor, expected: Tensor, dtype: torch.dtype) -> tuple[float | None, str]:
    """The error of a kernel that computes in `dtype` against dense, and its fault or "".

    The error is the largest difference over the largest expected number; None with some faults.
    """
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return None, "the sparse kernel returns another shape or dtype than dense"
    wide = torch.promote_types(expected.dtype, torch.float32)
    expected, result = expected.to(wide), result.to(wide)
    size = float(expected.abs().max()) if expected.numel() else 0.0
    gap = float((result - expected).abs().max()) if expected.numel() else 0.0
    error = gap / size if size else gap
    if not error < float("inf"):  # NaN included
        return None, "the sparse kernel or dense gives NaN or infinity on random input"
    bound = ERROR_BOUNDS.get(dtype, ERROR_BOUNDS[torch.bfloat16])
    return error, "" if error <= bound else "the sparse kernel computes wrong numbers"
