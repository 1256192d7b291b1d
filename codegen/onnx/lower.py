"""The last step: whole linears and attentions -> their final nodes, packed weights -> storage.

    Linear(x, w, b)           => Gemm(x, w, b, transB=1)          for x of rank 2
                              => MatMul(x, Transpose(w)) + b      else; one Transpose a weight
    NMLinear, BitmapLinear    => the same node with its ONNX storage and overload, plus functions
    SkipSoftmaxAttention, ...     => the same node with its overload, plus its function

A dense weight keeps its own name and shape, so that a state_dict and the file can be compared;
onnxruntime folds the Transpose at load. A packed weight `p` becomes `p.values` and `p.codes`, or
`p.values` and `p.gaps`.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import (
    InlinePass,
    RemoveUnusedFunctionsPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)

from sparsefx.codegen.onnx.attention_functions import BLOCK, SKIP_SOFTMAX, THETA, attention
from sparsefx.codegen.onnx.attention_nodes import WrittenAttention, final_node, variant_of, written
from sparsefx.codegen.onnx.functions import DOMAIN, VERSION, Variant, decompressor, linear
from sparsefx.codegen.onnx.simplify import merge_repeats
from sparsefx.codegen.onnx.storage import to_delta8
from sparsefx.codegen.onnx.translate import DENSE_LINEAR
from sparsefx.errors import NotExportable
from sparsefx.formats import PackedBitmap

_POSITIONS = 2**31


@dataclass(frozen=True)
class StoredWeight:
    """A packed weight of the file: its parameter name, layout ("2:4", "bitmap") and bytes."""

    name: str
    layout: str
    dense_bytes: int
    stored_bytes: int


class Written(NamedTuple):
    """What of the dialect is in the file."""

    weights: tuple[StoredWeight, ...]
    attentions: tuple[WrittenAttention, ...]

    @property
    def has_thresholds(self) -> bool:
        """Whether scores are compared with thresholds."""
        return any(each.operator != BLOCK for each in self.attentions)


@dataclass
class _Lowering:
    """One run over one model, and what it made so far."""

    model: ir.Model
    transposed: dict[ir.Value, ir.Value] = field(default_factory=dict)
    stored: dict[ir.Value, tuple[ir.Value, ir.Value, StoredWeight]] = field(default_factory=dict)
    attentions: list[WrittenAttention] = field(default_factory=list)

    @property
    def opset(self) -> int:
        return self.model.opset_imports[""]

    def free_name(self, parameter: str) -> str:
        """`parameter`, or with a number where two packings of it are in the file."""
        taken = {weight.name for _, _, weight in self.stored.values()}
        numbered = (f"{parameter}.{i}" for i in range(2, len(taken) + 2))
        return next(name for name in (parameter, *numbered) if name not in taken)


def lower(model: ir.Model, form: str, added: Collection[str] = ()) -> Written:
    """Brings `model` (of translate.py) to its final form, in place; returns what it wrote.

    form: "functions" keeps packed linears and sparse attentions as nodes of domain "sparsefx" with
    model-local functions, "standard" inlines them: only ai.onnx operators are left. added:
    names of tensors that passes put beside the model's own; only these are renamed.
    """
    state = _Lowering(model)
    for node in list(model.graph.all_nodes()):
        if node.domain == DOMAIN:
            _LOWER[node.op_type](node, state)
    if form == "standard":
        InlinePass()(model)
        merge_repeats(model)
    RemoveUnusedNodesPass()(model)
    RemoveUnusedFunctionsPass()(model)
    RemoveUnusedOpsetsPass()(model)
    _restore_masked_names(model, added)
    _strip_traces(model)
    weights = tuple(weight for _, _, weight in state.stored.values())
    return Written(weights, tuple(state.attentions))


def _lower_dense(node: ir.Node, state: _Lowering) -> None:
    x, weight = _required(node.inputs[0]), _required(node.inputs[1])
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if x.shape is not None and x.shape.rank() == 2:
        inputs = [x, weight] if bias is None else [x, weight, bias]
        _replace(node, [ir.node("Gemm", inputs, {"transB": 1})])
        return
    product = ir.node("MatMul", [x, _transpose(node, weight, state)])
    if bias is None:
        _replace(node, [product])
    else:
        _replace(node, [product, ir.node("Add", [product.outputs[0], bias])])


def _transpose(node: ir.Node, weight: ir.Value, state: _Lowering) -> ir.Value:
    """W^T; a stored weight is transposed once, at the head of the graph."""
    if weight in state.transposed:
        return state.transposed[weight]
    made = ir.node("Transpose", [weight], {"perm": [1, 0]}, name=f"{weight.name}.transposed")
    result = made.outputs[0]
    result.name = f"{weight.name}.T"
    result.type = weight.type
    if weight.is_initializer():
        state.model.graph.insert_before(state.model.graph[0], made)
        state.transposed[weight] = result
    else:
        assert node.graph is not None
        node.graph.insert_before(node, made)
    return result


def _lower_nm(node: ir.Node, state: _Lowering) -> None:
    values, index = _required(node.inputs[1]), _required(node.inputs[2])
    n, m = node.attributes.get_int("n"), node.attributes.get_int("m")
    if values not in state.stored:
        out, kept = _array(values).shape
        name = state.free_name(parameter(values))
        values.name, index.name = f"{name}.values", f"{name}.codes"
        weight = _stored(name, f"{n}:{m}", (out, kept * m // n), (values, index))
        state.stored[values] = values, index, weight
    _lower_packed(node, state, "NMLinear", {"n": n, "m": m}, first_optional=3)


def _lower_bitmap(node: ir.Node, state: _Lowering) -> None:
    x, values, bits = (_required(value) for value in node.inputs[:3])
    assert x.shape is not None
    shape = (len(_array(bits)), _size(x.shape[-1]))
    if shape[0] * shape[1] >= _POSITIONS:
        raise NotExportable(
            rule=f"{parameter(values)} has 2^31 elements or more and delta8 counts in 32 bits",
            remedy="Leave this weight dense",
        )
    if values not in state.stored:
        name = state.free_name(parameter(values))
        tensors = (torch.from_numpy(_array(_required(value))) for value in node.inputs[1:4])
        new = tuple(
            _initializer(state.model, f"{name}.{part}", tensor.numpy())
            for part, tensor in to_delta8(PackedBitmap(*tensors), shape[1])._asdict().items()
        )
        state.stored[values] = new[0], new[1], _stored(name, "bitmap", shape, new)
    _lower_packed(node, state, "BitmapLinear", {"shape": shape}, first_optional=4)


def _lower_attention(node: ir.Node, state: _Lowering) -> None:
    variant = variant_of(node)
    body = attention(variant, state.opset)
    state.model.functions.setdefault(body.identifier(), body)
    state.attentions.append(written(node, body))
    _replace(node, [final_node(node, variant.overload)])


_LOWER = {
    DENSE_LINEAR: _lower_dense,
    "NMLinear": _lower_nm,
    "BitmapLinear": _lower_bitmap,
    **dict.fromkeys((SKIP_SOFTMAX, THETA, BLOCK), _lower_attention),
}


def _lower_packed(
    node: ir.Node,
    state: _Lowering,
    name: str,
    attributes: Mapping[str, int | Sequence[int]],
    first_optional: int,
) -> None:
    """Puts the final packed node and its functions into the model.

    Inputs of `node`: x, the stored tensors, at `first_optional` the bias or None, extras.
    """
    first, second, _ = state.stored[_required(node.inputs[1])]
    bias, *extras = node.inputs[first_optional:] or (None,)
    variant = Variant(
        name=name,
        n=node.attributes.get_int("n", 0),
        m=node.attributes.get_int("m", 0),
        dtype=_dtype(first),
        has_bias=bias is not None,
        epilogue=node.attributes.get_string("epilogue", ""),
    )
    final = ir.node(
        name,
        [node.inputs[0], first, second, *([] if bias is None else [bias]), *extras],
        {**attributes, "epilogue": variant.epilogue},
        domain=DOMAIN,
        overload=variant.overload,
        version=VERSION,
    )
    for function in (decompressor(variant, state.opset), linear(variant, state.opset)):
        state.model.functions.setdefault(function.identifier(), function)
    _replace(node, [final])


def _size(dim: int | ir.SymbolicDim) -> int:
    assert isinstance(dim, int), "the input features of a linear are a number"
    return dim


def _replace(node: ir.Node, made: Sequence[ir.Node]) -> None:
    """Puts `made` in the place of `node`; the last one takes over its name, result and origin."""
    assert node.graph is not None
    made[-1].name = node.name
    for new in made:
        new.metadata_props.update(node.metadata_props)
    ir.convenience.replace_nodes_and_values(
        node.graph, node, [node], made, node.outputs, made[-1].outputs
    )


def _dtype(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None
    return value.dtype


_MASKED_SUFFIX = re.compile(r"_masked(_\d+)?$")
_PACKED_SUFFIX = re.compile(r"[._]values(_\d+)?$")


def parameter(values: ir.Value) -> str:
    """The weight of stored values, by name: "up.weight" of "up.weight.values" or "..._values"."""
    return _PACKED_SUFFIX.sub("", str(values.name))


def _stored(
    name: str, layout: str, shape: tuple[int, int], parts: Sequence[ir.Value]
) -> StoredWeight:
    arrays = [_array(part) for part in parts]
    dense = shape[0] * shape[1] * arrays[0].itemsize
    return StoredWeight(name, layout, dense, sum(array.nbytes for array in arrays))


def _initializer(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.Tensor(array, name=name)
    value = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor
    )
    model.graph.register_initializer(value)
    return value


def _array(value: ir.Value) -> np.ndarray:
    assert value.const_value is not None, f"{value.name} is not a stored tensor"
    return value.const_value.numpy()


def _required(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value


def _restore_masked_names(model: ir.Model, added: Collection[str]) -> None:
    """A weight that a folded mask changed, "w_masked", is the parameter w of this model."""
    initializers = model.graph.initializers
    for value in list(initializers.values()):
        name = _MASKED_SUFFIX.sub("", str(value.name))
        if value.name in added and name not in initializers:
            value.name = name


def _strip_traces(model: ir.Model) -> None:
    """Drops the exporter's notes (stack traces with local paths among them) but the module path."""
    for node in model.graph.all_nodes():
        namespace = node.metadata_props.get("namespace")
        node.metadata_props.clear()
        if namespace:
            node.metadata_props["namespace"] = namespace
        node.doc_string = None
