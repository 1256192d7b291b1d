"""with_values(): which codes and scales the numbers of a weight follow, beside its zeros.

Weight-only kinds are read from the weight alone (recover.py): packing it then changes no number.
"int8_dynamic" changes numbers at run time, so it is never found, only confirmed where asked for.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from sparsefx.detect import Found
from sparsefx.formats import NM_GROUPS, nm_count, pack_block
from sparsefx.patterns import NM, Block, Pattern, Unstructured
from sparsefx.recover import recovered_scales

# Kinds and groups that are looked for, those of fewest bits first.
_OF_ROWS = (
    *(("int4", group) for group in (128, 64, 32, 0)),
    *(("int8", group) for group in (0, 128)),
    ("fp8", 0),
)
_OF_BLOCKS = ("int4", "int8", "fp8")


def with_values(found: Found, weight: Tensor, hint: Pattern | None = None) -> Found:
    """`found` in `weight` [out, in], its pattern's values and group as the weight has them.

    hint: what is said to have been made of the weight; it is tried first, and where its codes hold
    its zeros are taken for its pattern, of which codes that are 0 may have left too few. Codes that
    are said to be there pay without any zeros: a bitmap of them is smaller than the dense weight.
    """
    for pattern in _tries(found.pattern, weight, hint):
        scales = recovered_scales(weight, pattern.values, pattern.tile(weight.shape[1]))
        if scales is not None:
            return replace(found, pattern=pattern, reason="")
    return found


def _tries(pattern: Pattern | None, weight: Tensor, hint: Pattern | None) -> Iterator[Pattern]:
    if not weight.numel() or (pattern is None and (hint is None or not hint.values)):
        return
    zeros = 1 - max(1, int(torch.count_nonzero(weight))) / weight.numel()
    rows = Unstructured(zeros) if pattern is None or isinstance(pattern, Block) else pattern
    if hint is not None and hint.values:
        yield replace(_held(hint, weight) or rows, values=hint.values, group=hint.group)
    if pattern is None:
        return
    if isinstance(pattern, Block):
        yield from (replace(pattern, values=kind) for kind in _OF_BLOCKS)
    yield from (replace(rows, values=kind, group=group) for kind, group in _OF_ROWS)


def _held(hint: Pattern, weight: Tensor) -> Pattern | None:
    """The N:M or blocks of `hint`, as `weight` has them; None where it has not."""
    match hint:
        case NM(n=n, m=m) if m in NM_GROUPS:
            count = nm_count(weight, m)
            return NM(n, m) if count is not None and count <= n else None
        case Block(rows=high, cols=wide) if hint.misfit(weight.shape) is None:
            blocks = weight.numel() // (high * wide)
            stored = max(1, len(pack_block(weight, high, wide).columns))
            return Block(high, wide, 1 - stored / blocks)
        case _:
            return None
