"""What every linear kernel does with a finished tile; printed into its module by emit.

With SPLIT = 1 the tile goes through bias, gate and epilogue and is stored. With SPLIT > 1 it is one
of SPLIT partial sums over in_features: it is kept in float32, and `reduce` adds the parts in order,
so that the result does not depend on which program came first.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def biased(acc, bias, out, out_inside):
    """The fp32 tile plus the bias; a generated kernel redefines it."""
    return acc


@triton.jit
def gated(gate, up):
    """What becomes of neighbouring rows of W where GATED; a generated kernel redefines it."""
    return gate * tl.sigmoid(gate) * up


@triton.jit
def epilogue(acc, extras, at, inside):
    """What happens to the fp32 tile before it is stored; a generated kernel redefines it."""
    return acc


@triton.jit
def store(
    acc,
    bias,
    extras,
    y,
    first_out,
    first_row,
    rows,
    out_features,
    OUT: tl.constexpr,
    ROWS: tl.constexpr,
    GATED: tl.constexpr,
):
    """Stores the tile acc [OUT, ROWS] = W x^T whole: y [rows, features] after the epilogue."""
    out = first_out + tl.arange(0, OUT)[:, None]
    row = first_row + tl.arange(0, ROWS)[None, :]
    acc = biased(acc, bias, out, out < out_features)
    features = out_features
    if GATED:  # rows of W alternate gate, up
        pairs = tl.permute(tl.reshape(acc, (OUT // 2, 2, ROWS)), (0, 2, 1))
        gate, up = tl.split(pairs)
        acc = gated(gate, up)
        out = first_out // 2 + tl.arange(0, OUT // 2)[:, None]
        features = out_features // 2
    inside = (out < features) & (row < rows)
    at = row.to(tl.int64) * features + out
    acc = epilogue(acc, extras, at, inside)
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=inside)


@triton.jit
def finish(
    acc,
    bias,
    extras,
    y,
    part,
    first_out,
    first_row,
    rows,
    out_features,
    OUT: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    GATED: tl.constexpr,
):
    """Stores the tile acc [OUT, ROWS] whole, or as number `part` of y [SPLIT, rows, out]."""
    if SPLIT == 1:
        store(acc, bias, extras, y, first_out, first_row, rows, out_features, OUT, ROWS, GATED)
    else:
        out = first_out + tl.arange(0, OUT)[:, None]
        row = first_row + tl.arange(0, ROWS)[None, :]
        at = (part.to(tl.int64) * rows + row) * out_features + out
        tl.store(y + at, acc, mask=(out < out_features) & (row < rows))


@triton.jit(do_not_specialize=["rows"])
def reduce(
    parts,
    bias,
    extras,
    y,
    rows,
    out_features,
    SPLIT: tl.constexpr,
    GATED: tl.constexpr,
    OUT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """y [rows, features] from the sum of parts [SPLIT, rows, out], added in order."""
    first_out = tl.program_id(0) * OUT
    first_row = tl.program_id(1) * ROWS
    out = first_out + tl.arange(0, OUT)[:, None]
    row = first_row + tl.arange(0, ROWS)[None, :]
    at = row.to(tl.int64) * out_features + out
    inside = (out < out_features) & (row < rows)
    acc = tl.zeros((OUT, ROWS), tl.float32)
    for part in tl.static_range(SPLIT):
        acc += tl.load(parts + at + part * rows.to(tl.int64) * out_features, mask=inside, other=0.0)
    store(acc, bias, extras, y, first_out, first_row, rows, out_features, OUT, ROWS, GATED)
