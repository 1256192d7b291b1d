"""What a user gives for calibration: checked before anything runs."""

import itertools
from collections.abc import Iterable, Mapping

from torch import Tensor

from sparsefx.errors import EmptyCalibration, UnknownOption

KNOWN = "an iterable of batches, such as a list of tensors, tuples or dicts"


def check_calibration(calibration: Iterable[object] | None) -> Iterable[object] | None:
    """The batches, as `check_batches` has them, or None where there are none to be."""
    return None if calibration is None else check_batches(calibration, "calibration")


def check_batches(batches: Iterable[object], option: str) -> Iterable[object]:
    """The batches, of which none is lost if they come once only.

    option: what the caller's argument is called. Raises EmptyCalibration and UnknownOption.
    """
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise UnknownOption(option=option, value=type(batches).__name__, known=KNOWN)
    rest = iter(batches)
    first = list(itertools.islice(rest, 1))
    if not first:
        raise EmptyCalibration()
    return itertools.chain(first, rest) if rest is batches else batches


def check_max_memory(max_memory: object) -> None:
    """Raises UnknownOption unless it is None or a number of bytes."""
    whole = isinstance(max_memory, int) and not isinstance(max_memory, bool) and max_memory >= 0
    if max_memory is not None and not whole:
        known = "None for no limit, or a whole number of bytes, at least 0"
        raise UnknownOption(option="max_memory", value=max_memory, known=known)
