"""What a pattern costs on a layer: parameters kept, bytes stored, or predicted nanoseconds.

A weight is stored as the compiler would: N:M as values and indices where m is 4, 8 or 16, blocks as
blocks or as a bitmap, other patterns as a bitmap, with codes where the pattern says so, and dense
where zeros are too few or the packed form is no smaller. Time is the roofline's, and never above
dense: a node whose sparse form is slower stays dense.
"""

import math

from sympy import Rational, ceiling

from sparsefx.cost import linear_cost, weight_bytes
from sparsefx.detect import BLOCK_SHAPES, MINIMUM_SPARSITY
from sparsefx.devices import Device
from sparsefx.errors import UnknownOption
from sparsefx.packing import Packing
from sparsefx.patterns import NM, Block, Columns, Pattern, Rows
from sparsefx.prune.allocation.layers import Layer


def cost(
    pattern: Pattern | None,
    layer: Layer,
    budget: str,
    device: Device | None = None,
    rows: int = 1,
) -> int:
    """The cost of `pattern` (None: dense) on `layer`, a whole number from 0 on.

    budget: "parameters" kept; "bytes" of the stored weight; "time": nanoseconds on `device` for
    `rows` rows of input, rounded up. Convolutions and experts run dense, whatever their zeros:
    there is no sparse kernel for them, so that their time is the same for every pattern, of experts
    that of all rows through all of them. Raises UnknownOption.
    """
    match budget:
        case "parameters":
            return kept(pattern, layer)
        case "bytes":
            return min(_bytes(packing, pattern, layer) for packing in _packings(pattern))
        case "time" if device is not None:
            is_linear = len(layer.shape) == 2 and layer.parts == 1
            packings = _packings(pattern) if is_linear else (_DENSE,)
            return min(_nanoseconds(each, pattern, layer, device, rows) for each in packings)
        case _:
            known = "parameters, bytes, or time with a device"
            raise UnknownOption(option="budget", value=budget, known=known)


def kept(pattern: Pattern | None, layer: Layer) -> int:
    """How many weights of the layer `pattern` keeps, as `Pattern.keep` counts.

    A criterion that counts in each row (Wanda) rounds there, and may keep up to one more a row.
    """
    numel, out = math.prod(layer.shape), layer.shape[0]
    match pattern:
        case None:
            return layer.numel
        case NM(n=n, m=m):
            return layer.numel // m * n
        case Block(rows=rows, cols=cols):
            own = _whole_units(pattern.sparsity, numel // (rows * cols), rows * cols)
        case Rows():
            own = _whole_units(pattern.sparsity, out, numel // out)
        case Columns():
            own = _whole_units(pattern.sparsity, numel // out, out)
        case _:
            own = _whole_units(pattern.sparsity, numel, 1)
    return layer.parts * own


def _whole_units(sparsity: float, units: int, size: int) -> int:
    """Weights in the units that are kept, of `units` of one size."""
    return (units - int(sparsity * units)) * size


_DENSE = Packing("dense")


def _packings(pattern: Pattern | None) -> tuple[Packing, ...]:
    """How the compiler might store it; the cheaper one is taken."""
    if pattern is None or pattern.sparsity < MINIMUM_SPARSITY:
        return (_DENSE,)
    packing = Packing.of(pattern)
    if packing.layout != "block":
        return _DENSE, packing
    is_found = packing.values or packing.block in BLOCK_SHAPES
    return _DENSE, packing.as_bitmap(), *((packing,) if is_found else ())


def _numbers(pattern: Pattern | None, packing: Packing, layer: Layer) -> tuple[int, int, Rational]:
    """n, m and density, as cost.py wants them."""
    return packing.n, packing.m or 1, Rational(kept(pattern, layer), layer.numel)


def _bytes(packing: Packing, pattern: Pattern | None, layer: Layer) -> int:
    # Rows run along the input channels, one for each output and tap of a convolution.
    channels = layer.shape[1]
    sizes = (layer.numel // channels, channels)
    size = weight_bytes(
        packing.layout,
        *sizes,
        *_numbers(pattern, packing, layer),
        layer.dtype,
        block=packing.block,
        values=packing.values,
        group=packing.group,
    )
    return int(ceiling(size))


def _nanoseconds(
    packing: Packing, pattern: Pattern | None, layer: Layer, device: Device, rows: int
) -> int:
    outputs = layer.parts * layer.shape[0]
    work = linear_cost(
        packing.layout,
        outputs,
        layer.numel // outputs,
        rows,
        *_numbers(pattern, packing, layer),
        layer.dtype,
        block=packing.block,
        values=packing.values,
        group=packing.group,
    )
    return math.ceil(work.seconds(device) * 1e9)
