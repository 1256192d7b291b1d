"""What every attention kernel's operator does first: a short row goes dense, a long one warns."""

import functools
import warnings

from torch import Tensor

from sparsefx.attention.dense import dense_attention
from sparsefx.attention.meaning import shaped


class BeyondCalibration(UserWarning):
    """An attention saw more keys than its thresholds were calibrated for."""


def dense_if_short(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    scale: float,
    window: int,
    dense_below: int,
    calibrated: int,
) -> Tensor | None:
    """The dense result of a call shorter than `dense_below`, else None: run the kernel.

    Decode is as long as its keys. Prefill was timed with as many queries as keys, so it is as long
    as the fewer of both: a few queries behind a long cache are too little work for its kernel.
    A call with more than `calibrated` keys (0: unknown) warns, once in a process for each
    `calibrated`; thresholds are then extrapolated as 1 / keys.
    """
    queries, keys = q.shape[-2], k.shape[-2]
    if (keys if queries == 1 else min(queries, keys)) < dense_below:
        # the operators promise one memory layout; torch's backends differ in theirs
        return shaped(dense_attention(q, k, v, mask, is_causal, scale, window), q)
    if calibrated and keys > calibrated:
        _warn_once(calibrated)
    return None


@functools.cache
def _warn_once(calibrated: int) -> None:
    warnings.warn(
        f"attention over more keys than the {calibrated} of its calibration: the thresholds are "
        "extrapolated as 1 / keys; calibrate on longer inputs to be sure of their error",
        BeyondCalibration,
        stacklevel=2,
    )
