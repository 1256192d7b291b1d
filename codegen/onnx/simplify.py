"""Tidies a fresh ONNX graph: folds constants, removes what does nothing, merges repeats.

torch.onnx would run onnxscript's whole optimiser. Of its rules one (slice_split_rule) tries every
pair of nodes, which is two thirds of the time to export a 30-layer language model, and one changes
weights (batch norm folded into convolutions, which onnxruntime does at load anyway).
"""

from collections.abc import Collection, Sequence

import onnx_ir as ir
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    InlinePass,
    LiftConstantsToInitializersPass,
    LiftSubgraphInitializersToMainGraphPass,
    NameFixPass,
    OutputFixPass,
    RemoveUnusedFunctionsPass,
    RemoveUnusedNodesPass,
)
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter import RewriteRuleSet
from onnxscript.rewriter.rules import common as rules

_RULES = (
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.no_op_transpose_rule,
    rules.no_op_static_scatter_nd_rule,
    rules.no_op_dynamic_scatter_nd_rule,
    rules.mul_by_1_rule,
    rules.div_by_1_rule,
    rules.add_0_rule,
    rules.sub_0_rule,
    rules.dropout_inference_rule,
    rules.dropout_zero_rule,
    rules.cast_cast_rule,
    rules.cast_constant_of_shape_rule,
    rules.cast_constant_of_shape_without_value_rule,
    rules.transpose_transpose_rule,
    rules.reshape_reshape_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.materialize_reshape_shape_rule,
    rules.one_reshape_matmul_reshape_rule,
    rules.two_reshapes_matmul_reshape_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.fuse_pad_into_conv_rule,
)
_SMALL = 1024  # bytes; comparing larger constants costs more than it saves
_ROUNDS = 2  # what a rule removes may let constants fold, and the other way round


def simplify(model: ir.Model) -> None:
    """Simplifies `model` in place; weights and inputs keep their names, large ones are kept."""
    inputs = [(value, value.name) for value in model.graph.inputs]
    weights = set(model.graph.initializers)
    InlinePass()(model)
    rule_set = RewriteRuleSet(_RULES)
    for _ in range(_ROUNDS):
        fold_constants_ir(model)
        rule_set.apply_to_model(model)
        RemoveUnusedNodesPass()(model)
    RemoveUnusedFunctionsPass()(model)
    _merge_repeats(model, weights)
    OutputFixPass()(model)
    _restore_inputs(model, inputs)
    NameFixPass()(model)


def merge_repeats(model: ir.Model) -> None:
    """Stores equal small constants once, computes equal values once; names stay."""
    _merge_repeats(model, set(model.graph.initializers))


def _merge_repeats(model: ir.Model, weights: Collection[str | None]) -> None:
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    LiftSubgraphInitializersToMainGraphPass()(model)
    _merge_constants(model, weights)
    CommonSubexpressionEliminationPass()(model)


def _merge_constants(model: ir.Model, weights: Collection[str | None]) -> None:
    """Stores equal small constants once. Equal weights, two fresh biases say, stay two names."""
    initializers = model.graph.initializers
    first: dict[tuple[object, ...], ir.Value] = {}
    for name, value in list(initializers.items()):
        tensor = value.const_value
        if name in weights or tensor is None or tensor.nbytes > _SMALL or value.is_graph_output():
            continue
        same = first.setdefault((tensor.dtype, tuple(tensor.shape), tensor.tobytes()), value)
        if same is not value:
            value.replace_all_uses_with(same)
            del initializers[name]


def _restore_inputs(model: ir.Model, inputs: Sequence[tuple[ir.Value, str | None]]) -> None:
    """An input `x` that is also an output stays `x`; OutputFixPass gave its name to the output."""
    for value, name in inputs:
        if value.name == name:
            continue
        for output in model.graph.outputs:
            if output.name == name:
                output.name = f"{name}_out"
        value.name = name
