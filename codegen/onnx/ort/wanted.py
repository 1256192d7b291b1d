"""Which kernels the packed linears of an ONNX model need."""

import onnx_ir as ir
import torch

from sparsefx.codegen.onnx.functions import DOMAIN, Variant
from sparsefx.errors import NotExportable
from sparsefx.target import LinearSpec

ELEMENT_TYPES = {torch.float32: 1, torch.float16: 10}  # of ONNX, for the dtypes of the kernels
_DTYPES = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16}
LAYOUTS = {"NMLinear": "nm", "BitmapLinear": "bitmap"}


def wanted(model: ir.Model) -> tuple[LinearSpec, ...]:
    """A spec for each packed linear of `model` (as lower.py leaves it, form="functions").

    Raises NotExportable for float64, and where there is no packed linear at all.
    """
    nodes = [node for node in model.graph.all_nodes() if node.domain == DOMAIN]
    specs = tuple(_spec(node) for node in nodes if node.op_type in LAYOUTS)
    if not specs:
        raise NotExportable(
            rule="no weight of the model is stored packed, so a library has nothing to run",
            remedy="Prune it first, by recipe= or sparsefx.sparsify, or leave out library=",
        )
    return specs


def _spec(node: ir.Node) -> LinearSpec:
    values = node.inputs[1]
    assert values is not None
    assert values.const_value is not None
    stored, dtype = values.const_value, values.dtype
    if dtype not in _DTYPES:
        raise NotExportable(
            rule=f"{values.name} is {dtype}, and the library's kernels take float32 and float16",
            remedy="Convert the model with .float() or .half(), or leave out library=",
        )
    n, m = (node.attributes.get_int(name, 0) for name in ("n", "m"))
    out, width = dense_shape(node)
    epilogue = node.attributes.get_string("epilogue", "")
    extras = Variant(node.op_type, n, m, dtype, has_bias=False, epilogue=epilogue).extras
    return LinearSpec(
        layout=LAYOUTS[node.op_type],
        out_features=out,
        in_features=width,
        n=n,
        m=m,
        density=stored.size / (out * width),
        dtype=_DTYPES[dtype],
        has_bias=len(node.inputs) > 3 + extras,
        epilogue=epilogue,
        rows=1,
        rows_vary=True,
    )


def dense_shape(node: ir.Node) -> tuple[int, int]:
    """[out, in] of the weight of a packed linear."""
    if node.op_type != "NMLinear":
        out, width = node.attributes.get_ints("shape")
        return out, width
    values = node.inputs[1]
    assert values is not None
    assert values.const_value is not None
    out, kept = values.const_value.shape.numpy()
    return out, kept // node.attributes.get_int("n") * node.attributes.get_int("m")
