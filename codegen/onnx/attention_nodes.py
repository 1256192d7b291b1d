"""Sparse attentions on their way into the file: dialect call -> node -> node with its body."""

import ast
from dataclasses import dataclass

import onnx_ir as ir

from sparsefx.codegen.onnx.attention_functions import SKIP_SOFTMAX, THETA, AttentionVariant
from sparsefx.codegen.onnx.functions import DOMAIN, VERSION
from sparsefx.errors import NotExportable

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_OPTIONS = {SKIP_SOFTMAX: ("order",), THETA: ("placement", "denominator")}


@dataclass(frozen=True)
class WrittenAttention:
    """A sparse attention of the file.

    name: of its module ("model.layers.0.self_attn"), or of its node where none is known; operator:
    "SkipSoftmaxAttention" and so on; nodes: of its body, constants not counted, of which
    form="standard" puts at most so many in its place.
    """

    name: str
    operator: str
    nodes: int


def variant_of(node: ir.Node) -> AttentionVariant:
    """Which body `node` (of translate.py) needs. Raises NotExportable for float64."""
    q, k, _v, mask = node.inputs[:4]
    assert q is not None
    assert k is not None
    assert q.shape is not None
    assert k.shape is not None
    if q.dtype not in _FLOATS:
        raise NotExportable(
            rule=f"sparse attention {node.name} is {q.dtype}, and its scores are float32 in ONNX",
            remedy="Convert the model with .float() or .half()",
        )
    one_query = q.shape[2] == 1
    is_skip = node.op_type == SKIP_SOFTMAX
    options = [node.attributes.get_string(name) for name in _OPTIONS.get(node.op_type, ())]
    if node.op_type == THETA:
        options.append("v_mean" if node.attributes.get_int("v_mean") else "")
    return AttentionVariant(
        name=node.op_type,
        dtype=q.dtype,
        phase=_phase(q.shape[2]) if is_skip else "",
        grouped=q.shape[1] != k.shape[1],
        mask=None if mask is None else mask.dtype,
        is_causal=bool(node.attributes.get_int("is_causal")) and not one_query,
        has_window=node.attributes.get_int("window") > 0,
        options=tuple(str(option) for option in options),
    )


def written(node: ir.Node, body: ir.Function) -> WrittenAttention:
    """What `node` (of translate.py) with this body is, for reports."""
    scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    module = scopes[-2] if len(scopes) > 1 else ""  # the last one is the node
    nodes = sum(each.op_type != "Constant" for each in body)
    return WrittenAttention(module or str(node.name), node.op_type, nodes)


def final_node(node: ir.Node, overload: str) -> ir.Node:
    """`node` as a call of its function."""
    return ir.node(
        node.op_type,
        node.inputs,
        {name: attribute.value for name, attribute in node.attributes.items()},
        domain=DOMAIN,
        overload=overload,
        version=VERSION,
    )


def _phase(queries: int | ir.SymbolicDim) -> str:
    if isinstance(queries, int):
        return "decode" if queries == 1 else "prefill"
    return "any"
