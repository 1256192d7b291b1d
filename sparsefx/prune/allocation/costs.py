"""What a pattern costs on a layer: parameters kept, bytes stored, or predicted nanoseconds.

A weight is stored as the compiler would: N:M as values and indices where m is 4, 8 or 16, other
patterns as a bitmap, and dense where zeros are too few or the packed form is no smaller. Time is
the roofline's, and never above dense: a node whose sparse form is slower stays dense.
"""

import math

from sympy import Rational

from sparsefx.cost import linear_cost, weight_bytes
from sparsefx.detect import MINIMUM_SPARSITY
from sparsefx.devices import Device
from sparsefx.errors import UnknownOption
from sparsefx.formats import NM_GROUPS
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
            return min(_bytes(layout, pattern, layer) for layout in _layouts(pattern))
        case "time" if device is not None:
            is_linear = len(layer.shape) == 2 and layer.parts == 1
            layouts = _layouts(pattern) if is_linear else ("dense",)
            return min(_nanoseconds(layout, pattern, layer, device, rows) for layout in layouts)
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


def _layouts(pattern: Pattern | None) -> tuple[str, ...]:
    """How the compiler might store it; the cheaper one is taken."""
    if pattern is None or pattern.sparsity < MINIMUM_SPARSITY:
        return ("dense",)
    return ("dense", "nm" if isinstance(pattern, NM) and pattern.m in NM_GROUPS else "bitmap")


def _numbers(pattern: Pattern | None, layer: Layer) -> tuple[int, int, Rational]:
    """n, m and density, as cost.py wants them."""
    n, m = (pattern.n, pattern.m) if isinstance(pattern, NM) else (0, 1)
    return n, m, Rational(kept(pattern, layer), layer.numel)


def _bytes(layout: str, pattern: Pattern | None, layer: Layer) -> int:
    # Rows run along the input channels, one for each output and tap of a convolution.
    channels = layer.shape[1]
    sizes = (layer.numel // channels, channels)
    return int(weight_bytes(layout, *sizes, *_numbers(pattern, layer), layer.dtype))


def _nanoseconds(
    layout: str, pattern: Pattern | None, layer: Layer, device: Device, rows: int
) -> int:
    outputs = layer.parts * layer.shape[0]
    sizes = (outputs, layer.numel // outputs)
    work = linear_cost(layout, *sizes, rows, *_numbers(pattern, layer), layer.dtype)
    return math.ceil(work.seconds(device) * 1e9)
