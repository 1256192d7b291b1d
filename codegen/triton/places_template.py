"""Template of the linear kernel by stored value: multiply each by the numbers of x in its column.

W lies in vectors of sixteen values of a row and their columns (places_pack.py). A lane takes one
vector after the other, LANES of them share a row of W, and each value is multiplied with up to 8
rows of x at once, or twice with 8: `ordered` has put x column by column for that. The zeros of W
are neither read nor computed.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from sparsefx.codegen.triton.finish_part import finish, reduce  # noqa: F401  # reduce: launched


@triton.jit
def four(tile, LENGTH: tl.constexpr):
    """The columns of a tile [LENGTH, 4]."""
    even, odd = tl.split(tl.reshape(tile, (LENGTH, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def sixteen(tile, LENGTH: tl.constexpr):
    """The columns of a tile [LENGTH, 16], in the same order for every tile."""
    even, odd = tl.split(tl.reshape(tile, (LENGTH, 8, 2)))
    a, b = tl.split(tl.reshape(even, (LENGTH, 4, 2)))
    c, d = tl.split(tl.reshape(odd, (LENGTH, 4, 2)))
    return four(a, LENGTH) + four(b, LENGTH) + four(c, LENGTH) + four(d, LENGTH)


@triton.jit
def loaded(at, keep, COUNT: tl.constexpr):
    """COUNT numbers from each of `at` [LENGTH] on, whole, so that a lane has its own; `keep` or 0.

    Two bfloat16 are a word, [LENGTH, COUNT / 2]; `keep` may be None.
    """
    if keep is not None:
        keep = keep[:, None]
    other: tl.constexpr = None if keep is None else 0
    if at.dtype.element_ty == tl.bfloat16 and COUNT > 1:
        words = at.to(tl.pointer_type(tl.uint32), bitcast=True)[:, None]
        found = tl.load(words + tl.arange(0, COUNT // 2)[None, :], mask=keep, other=other)
    else:
        found = tl.load(at[:, None] + tl.arange(0, COUNT)[None, :], mask=keep, other=other)
    return found


@triton.jit
def numbers(found, LENGTH: tl.constexpr, COUNT: tl.constexpr):
    """What was `loaded` as float32 [LENGTH, COUNT]: a bfloat16 is the upper half of one."""
    if found.dtype == tl.uint32:
        found = tl.join(found << 16, found & 0xFFFF0000).to(tl.float32, bitcast=True)
        found = tl.reshape(found, (LENGTH, COUNT))
    return found.to(tl.float32)


@triton.jit
def column(x, base, place, ROWS: tl.constexpr):
    """Where x [in, ROWS] has column base + place; in bytes, an address takes fewer instructions."""
    if ROWS == 1:
        found = x + base + place
    else:
        found = x.to(tl.pointer_type(tl.uint8), bitcast=True) + (base + place) * (2 * ROWS)
        found = found.to(x.dtype, bitcast=True)
    return found


@triton.jit
def vector(values, places, bases, at, end):
    """Vectors `at` [LENGTH], zeros from `end` on: base, places, and twice eight values."""
    keep = at < end
    base = tl.load(bases + at, mask=keep, other=0)
    slot = at[:, None] * 16 + tl.arange(0, 16)[None, :]
    place = tl.load(places + slot, mask=keep[:, None], other=0)
    return base, place, loaded(values + at * 16, keep, 8), loaded(values + at * 16 + 8, keep, 8)


@triton.jit(do_not_specialize=["rows"])
def kernel(
    x,
    values,
    places,
    bases,
    starts,
    bias,
    extras,
    y,
    rows,
    out_features,
    in_features,
    ROWS: tl.constexpr,
    PLANES: tl.constexpr,
    LANES: tl.constexpr,
    LENGTH: tl.constexpr,
    AHEAD: tl.constexpr,
    SPLIT: tl.constexpr,
    GATED: tl.constexpr,
):
    """y [rows, out] = epilogue(x W^T) for LENGTH / LANES rows of W and all of x [.., in, ROWS].

    There are PLANES of x: 1, or 2 that lie behind each other. A program has LENGTH lanes. With
    AHEAD a lane loads its next vector before it multiplies this one.
    """
    OUT: tl.constexpr = LENGTH // LANES
    first_out, part = tl.program_id(0) * OUT, tl.program_id(1)
    lane = tl.arange(0, LENGTH)
    out = tl.minimum(first_out + lane // LANES, out_features - 1)
    begin = tl.load(starts + out)
    count = tl.load(starts + out + 1) - begin
    end = begin + count * (part + 1) // SPLIT
    at = begin + count * part // SPLIT + lane % LANES
    acc = tl.zeros((LENGTH, ROWS), tl.float32)
    acc1 = acc
    base, place, early, late = vector(values, places, bases, at, end)
    for _ in range(tl.max((end - at + LANES - 1) // LANES)):
        if AHEAD:
            at += LANES
            after = vector(values, places, bases, at, end)
        else:
            base, place, early, late = vector(values, places, bases, at, end)
            at += LANES
        first, last = numbers(early, LENGTH, 8), numbers(late, LENGTH, 8)
        both = tl.permute(tl.join(first, last), (0, 2, 1))
        value = sixteen(tl.reshape(both, (LENGTH, 16)), LENGTH)
        behind = sixteen(place.to(tl.uint32), LENGTH)
        first_column = base.to(tl.uint32) & 0xFFFF
        for i in tl.static_range(16):
            of_x = column(x, first_column, behind[i], ROWS)
            weight = value[i][:, None]
            acc += weight * numbers(loaded(of_x, None, ROWS), LENGTH, ROWS)
            if PLANES == 2:
                of_x += in_features * ROWS
                acc1 += weight * numbers(loaded(of_x, None, ROWS), LENGTH, ROWS)
        if AHEAD:
            base, place, early, late = after

    acc = tl.sum(tl.reshape(acc, (OUT, LANES, ROWS)), 1)
    finish(acc, bias, extras, y, part, first_out, 0, rows, out_features, OUT, ROWS, SPLIT, GATED)
    if PLANES == 2:
        acc = tl.sum(tl.reshape(acc1, (OUT, LANES, ROWS)), 1)
        finish(
            acc, bias, extras, y, part, first_out, ROWS, rows, out_features, OUT, ROWS, SPLIT, GATED
        )


@triton.jit(do_not_specialize=["rows"])
def ordered(x, y, rows, in_features, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """y [planes, in, ROWS] of x [rows, in], with zeros behind the last row."""
    at = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[:, None]
    row = tl.arange(0, ROWS)[None, :]
    of_x = tl.program_id(1) * ROWS + row
    inside = at < in_features
    found = tl.load(x + of_x * in_features + at, mask=inside & (of_x < rows), other=0.0)
    tl.store(y + (tl.program_id(1) * in_features + at) * ROWS + row, found, mask=inside)
