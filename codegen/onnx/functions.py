"""The table dialect operator -> ONNX function, in ONNX's own textual syntax.

Domain "sparsefx", version 1. A function is found by its domain, its name and its *overload* (IR
version 10). The name says what a node means, so a runtime that registers a kernel for
`sparsefx::NMLinear` takes all of its nodes; the overload says which body a stock runtime runs: one
for each N:M, dtype, bias and epilogue.

    NMLinear      <n, m, epilogue>         (x, values, codes, bias?, extras...) => y
    BitmapLinear  <shape, epilogue>        (x, values, gaps, bias?, extras...) => y
        = epilogue(x W^T + bias), W = Decompress...(values, ...)
    DecompressNM_<n>_<m>_<dtype>           (values, codes) => weight [out, in]
    DecompressDelta8_<dtype>  <shape>      (values, gaps) => weight [out, in]

A node that a library would not make faster (ort/guard.py) has the domain "sparsefx.dense", which
nothing registers a kernel for.

The decompressors have names of their own because onnxruntime finds no overload from inside a
function. Storage of the weights: storage.py. A decompressor may hold only operators that
onnxruntime folds at load for fp32 and fp16. Not `Where`: it has no fp16 CPU kernel, so it stays and
runs at every call. Not `NonZero`: it is never folded. Not `CastLike`: outside functions it is not
folded either.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx.parser
import onnx_ir as ir

from sparsefx.epilogue import Step, parse
from sparsefx.formats import index_bits

DOMAIN = "sparsefx"
DENSE_DOMAIN = "sparsefx.dense"
VERSION = 1

_FUNCTION = """
<domain: "sparsefx", overload: "{overload}", opset_import: ["": {opset}, "sparsefx": 1]>
{head}
{{
  {body}
}}"""

_DECOMPRESS_NM = """
  last = Constant <value_ints = [-1]> ()
  shifts = Constant <value = uint8[{lanes}] {{{shifts}}}> ()
  low = Constant <value = uint8 {{{low}}}> ()
  bytes = Unsqueeze (codes, last)
  shifted = BitShift <direction = "RIGHT"> (bytes, shifts)
  fields = BitwiseAnd (shifted, low)
  padded = Flatten <axis = 1> (fields)
  first = Constant <value_ints = [0]> ()
  second = Constant <value_ints = [1]> ()
  stored = Shape <start = 1> (values)
  columns = Slice (padded, first, stored, second)
  by_group = Constant <value_ints = [0, -1, {n}]> ()
  grouped = Reshape (columns, by_group)
  index = Cast <to = 6> (grouped)
  kept = Reshape (values, by_group)
  groups = Shape <start = 0, end = 2> (kept)
  m = Constant <value_ints = [{m}]> ()
  size = Concat <axis = 0> (groups, m)
  nothing = Constant <value_float = 0.0> ()
  zero = Cast <to = {dtype}> (nothing)
  zeros = Expand (zero, size)
  dense = ScatterElements <axis = 2> (zeros, index, kept)
  weight = Flatten <axis = 1> (dense)"""

_DECOMPRESS_DELTA8 = """
  size = Constant <value_ints: ints = @shape> ()
  steps = Cast <to = 6> (gaps)
  axis = Constant <value_int = 0> ()
  positions = CumSum (steps, axis)
  count = ReduceProd <keepdims = 1> (size)
  nothing = Constant <value_float = 0.0> ()
  zero = Cast <to = {dtype}> (nothing)
  zeros = Expand (zero, count)
  dense = ScatterElements <axis = 0> (zeros, positions, values)
  weight = Reshape (dense, size)"""

_WEIGHT = {
    "NMLinear": "weight = sparsefx.{decompressor} (values, codes)",
    "BitmapLinear": "weight = sparsefx.{decompressor} <shape: ints = @shape> (values, gaps)",
}
_STORED = {"NMLinear": "codes", "BitmapLinear": "gaps"}
_ATTRIBUTES = {"NMLinear": "<n, m, epilogue> ", "BitmapLinear": "<shape, epilogue> "}

# The lines of each step of epilogue.py; {a} is the running value, {y} the next one.
_STEPS = {
    "relu": ("{y} = Relu ({a})",),
    "silu": ("{y}_gate = Sigmoid ({a})", "{y} = Mul ({a}, {y}_gate)"),
    "gelu": ("{y} = Gelu ({a})",),
    "gelu_tanh": ('{y} = Gelu <approximate = "tanh"> ({a})',),
    "scale": (
        "{y}_number = Constant <value_float = {operand:.9e}> ()",
        "{y}_factor = Cast <to = {dtype}> ({y}_number)",
        "{y} = Mul ({a}, {y}_factor)",
    ),
    "add": ("{y} = Add ({a}, extra{operand})",),
    "mul": ("{y} = Mul ({a}, extra{operand})",),
}


@dataclass(frozen=True)
class Variant:
    """Which body a NMLinear or BitmapLinear node needs. `n` and `m` are 0 for BitmapLinear."""

    name: str
    n: int
    m: int
    dtype: ir.DataType
    has_bias: bool
    epilogue: str

    @property
    def decompressor(self) -> str:
        """The name of the function that gives the dense weight: "DecompressNM_2_4_float"."""
        layout = f"NM_{self.n}_{self.m}" if self.name == "NMLinear" else "Delta8"
        return f"Decompress{layout}_{self.dtype.name.lower()}"

    @property
    def overload(self) -> str:
        """An identifier of everything the body depends on: "NM_2_4_float_bias_gelu_mul_0"."""
        words = [self.decompressor.removeprefix("Decompress"), *(["bias"] if self.has_bias else [])]
        steps = "_".join((*words, *(str(step) for step in parse(self.epilogue))))
        return steps.translate({ord(" "): "_", ord("."): "p", ord("-"): "m", ord("+"): None})

    @property
    def extras(self) -> int:
        """How many operands the epilogue takes beside the running value."""
        used = (step.operand for step in parse(self.epilogue) if step.op in ("add", "mul"))
        return max((int(operand or 0) + 1 for operand in used), default=0)


def linear(variant: Variant, opset: int) -> ir.Function:
    """The function of a packed linear: decompress, transpose, MatMul, bias, epilogue."""
    extras = tuple(f"extra{i}" for i in range(variant.extras))
    bias = ("bias",) if variant.has_bias else ()
    inputs = ("x", "values", _STORED[variant.name], *bias, *extras)
    names = [f"step{i}" for i in range(len(parse(variant.epilogue)) + len(bias))]
    product, *after = [*names, "y"]
    lines = [
        _WEIGHT[variant.name].format(decompressor=variant.decompressor),
        "columns = Transpose <perm = [1, 0]> (weight)",
        f"{product} = MatMul (x, columns)",
    ]
    if variant.has_bias:
        lines.append(f"{after[0]} = Add ({product}, bias)")
        product, *after = after
    for step, y in zip(parse(variant.epilogue), after, strict=True):
        lines += _step_lines(step, product, y, variant.dtype)
        product = y
    head = f"{variant.name} {_ATTRIBUTES[variant.name]}({', '.join(inputs)}) => (y)"
    return function(head, lines, opset, variant.overload)


def decompressor(variant: Variant, opset: int) -> ir.Function:
    """The function that gives the dense weight [out, in] of a packed linear."""
    dtype = variant.dtype.value
    if variant.name == "BitmapLinear":
        head = f"{variant.decompressor} <shape> (values, gaps) => (weight)"
        return function(head, [_DECOMPRESS_DELTA8.format(dtype=dtype)], opset)
    bits = index_bits(variant.m)
    shifts = range(0, 8, bits)
    body = _DECOMPRESS_NM.format(
        n=variant.n,
        m=variant.m,
        dtype=dtype,
        lanes=len(shifts),
        shifts=", ".join(map(str, shifts)),
        low=2**bits - 1,
    )
    return function(f"{variant.decompressor} (values, codes) => (weight)", [body], opset)


def _step_lines(step: Step, a: str, y: str, dtype: ir.DataType) -> list[str]:
    return [
        line.format(a=a, y=y, operand=step.operand, dtype=dtype.value) for line in _STEPS[step.op]
    ]


def function(head: str, lines: Sequence[str], opset: int, overload: str = "") -> ir.Function:
    """The function of domain "sparsefx" with this signature and body."""
    text = _FUNCTION.format(head=head, overload=overload, opset=opset, body="\n  ".join(lines))
    return ir.serde.deserialize_function(onnx.parser.parse_function(text))
