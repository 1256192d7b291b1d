"""Makes Triton's CPU interpreter reduce by a maximum that hands NaN on: a repair for tests only.

The interpreter runs a reduction it does not know by name, such as `tile_part.larger`, element by
element in Python, a thousand times slower than numpy.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
from triton.runtime import interpreter

_apply = interpreter.ReduceOps.apply_impl


@contextmanager
def fast() -> Iterator[None]:
    """Within it, `larger` reduces as numpy's max does, which is its meaning."""
    with mock.patch.object(interpreter.ReduceOps, "apply_impl", _apply_impl):
        yield


def _apply_impl(
    self: interpreter.ReduceOps, values: list[interpreter.tl.tensor]
) -> interpreter.tl.tensor:
    if self.combine_fn.__name__ != "larger":
        return _apply(self, values)
    return self.min_max(values[0], val_reduce_op=np.max)
