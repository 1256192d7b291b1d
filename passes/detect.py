"""dense -> dense:  each candidate gets a row of the report; weights are searched for patterns.

Runs first. Reads the zeros, and codes times scales, that are in the weights of an arbitrary
checkpoint; changes no node.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from sparsefx.attention.sites import shape_text
from sparsefx.candidates import (
    ATTENTION,
    Candidate,
    candidates,
    is_flex,
    parameter_name,
    rows_of,
    stored_weight,
)
from sparsefx.passes.adopt import adopt
from sparsefx.pipeline import PassContext
from sparsefx.report import Row
from sparsefx.rewrite import arguments
from sparsefx.spec import Pattern

NOT_ASKED = "attention is dense: the recipe asks for no sparse attention"
UNLOWERED = "convolution: it is dense in training and in ONNX files"
"""What a convolution's row says unless `lower_conv` says more."""


@dataclass(frozen=True)
class Detect:
    """Finds the candidates of a graph and the tightest pattern of each constant weight.

    attention: whether thresholds are to be laid on attentions; `threshold_softmax` then says what
    became of each. patterns: parameter name -> what was decided for it, which is looked for first;
    codes: whether weights are searched for codes too, or only their zeros.
    """

    attention: bool = False
    patterns: Mapping[str, Pattern] = field(default_factory=dict)
    codes: bool = True
    name: str = "detect"
    stage: str = "dense"

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> int:
        """Returns how many weights hold a usable pattern."""
        found = 0
        for number, candidate in enumerate(candidates(gm)):
            key = f"{number}:{candidate.name}"
            candidate.node.meta["sparsefx_row"] = key
            ctx.rows[key] = self._row(candidate, ctx)
            found += candidate.weight is not None and not ctx.rows[key].reason
        return found + adopt(gm, ctx)

    def _row(self, candidate: Candidate, ctx: PassContext) -> Row:
        row = Row(name=candidate.name, op=candidate.op, graph=ctx.graph)
        if candidate.op != "attention":
            return _other_row(self, row, candidate, ctx)
        if candidate.node.target is ATTENTION:
            row = replace(row, shape=shape_text(candidate.node))
        if is_flex(candidate.node):
            return replace(row, reason="attention: flex_attention is left as it is")
        return row if self.attention else replace(row, reason=NOT_ASKED)


def _other_row(options: Detect, row: Row, candidate: Candidate, ctx: PassContext) -> Row:
    if candidate.op == "layer":
        return replace(row, reason="its linears are inside one operator, which is left as it is")
    if candidate.op == "conv":
        return replace(row, reason=UNLOWERED)
    if candidate.op == "experts":
        return replace(row, reason="a stack of expert weights: no kernel takes 3-d weights yet")
    if candidate.weight is None:
        reason = "the weight is computed or changed in the graph, or transposed there"
        return replace(row, reason=reason)
    return _weight_row(options, row, candidate, ctx)


def _weight_row(options: Detect, row: Row, candidate: Candidate, ctx: PassContext) -> Row:
    assert candidate.weight is not None
    weight = candidate.weight.meta["val"]
    name = str(candidate.weight.target)
    ctx.dense[name] = weight
    out, in_ = stored_weight(candidate).shape
    is_addmm = candidate.node.target is torch.ops.aten.addmm.default
    x = arguments(candidate.node)[1 if is_addmm else 0]
    assert isinstance(x, fx.Node)
    rows, vary = rows_of(x)
    size = weight.numel() * weight.element_size()
    shape = f"{out}x{in_} @ {rows}{'..' if vary else ''}"
    row = replace(row, shape=shape, dense_bytes=size, stored_bytes=size)
    said = options.patterns.get(parameter_name(candidate.weight))
    hint = candidate.weight.meta.get("sparsefx_pattern", said)
    found = ctx.weights.found(weight, candidate.transposed, hint, codes=options.codes)
    if found.pattern is None:
        return replace(row, reason=found.reason)
    return replace(row, pattern=str(found.pattern))
