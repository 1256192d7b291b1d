"""Pass, PassContext and run(): what every pass would otherwise do itself, done once."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor, fx

from sparsefx import debug, dump
from sparsefx.attention.operators import ATTENTION_OPS
from sparsefx.attributes import get_tensor, is_graph, remove_unused
from sparsefx.dense_weights import DenseWeights
from sparsefx.errors import InvalidGraph
from sparsefx.ops import MASKED_OPS, PACKED_OPS
from sparsefx.report import Row
from sparsefx.report_rows import shared
from sparsefx.weights import WeightMemo

# stage -> dialect operators that may appear in it; a model may bring packed linears of its own
STAGES: dict[str, frozenset[torch._ops.OpOverload]] = {
    "dense": PACKED_OPS,
    "masked": MASKED_OPS | ATTENTION_OPS | PACKED_OPS,
    "packed": MASKED_OPS | ATTENTION_OPS | PACKED_OPS,
    "folded": ATTENTION_OPS | PACKED_OPS,
    "lowered": frozenset(),
    "any": MASKED_OPS | ATTENTION_OPS | PACKED_OPS,  # where SPARSEFX_SKIP left out a pass before
}


@dataclass
class PassContext:
    """What passes share while one graph goes through the pipeline.

    graph: number of this graph; rows: candidate key -> its row of the report; weights: what is
    known of the model's weights, shared by all its graphs; dense: name -> the original weights;
    baked: names of the weights whose present values went into the graph; seconds: pass name -> time
    spent. merged: the row of a node that computes several candidates -> their rows, each with its
    share of the node's times and bytes.
    """

    weights: WeightMemo = field(default_factory=WeightMemo)
    graph: int = 0
    rows: dict[str, Row] = field(default_factory=dict)
    dense: DenseWeights = field(default_factory=DenseWeights)
    baked: set[str] = field(default_factory=set)
    seconds: dict[str, float] = field(default_factory=dict)
    merged: dict[str, dict[str, float]] = field(default_factory=dict)

    def row(self, node: fx.Node) -> Row:
        """The report row of the candidate that `node` is, or replaced."""
        return self.rows[node.meta["sparsefx_row"]]

    def update(self, node: fx.Node, **changes: object) -> None:
        """Changes fields of the candidate's row; of a merged node's rows, each by its share."""
        key = node.meta["sparsefx_row"]
        for each, share in self.merged.get(key, {key: 1.0}).items():
            fields = shared(changes, share)
            self.rows[each] = replace(self.rows[each], **fields)  # type: ignore[arg-type]

    def decline(self, node: fx.Node, reason: str) -> None:
        """Notes why a candidate stays as it is; nodes that are no candidates are ignored."""
        if "sparsefx_row" in node.meta:
            self.update(node, reason=reason)


class Pass(Protocol):
    """A rewrite of a graph: a frozen dataclass whose fields are its options."""

    @property
    def name(self) -> str:
        """Shown in dumps and reports; what SPARSEFX_SKIP takes."""
        ...

    @property
    def stage(self) -> str:
        """The stage of the graph it leaves, a key of STAGES."""
        ...

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> int:
        """Rewrites `gm` in place; returns how many rewrites it made."""
        ...


def run(gm: fx.GraphModule, passes: Sequence[Pass], ctx: PassContext) -> dict[str, int]:
    """Runs passes in order, each followed by clean-up, verification and dump.

    Returns pass name -> number of rewrites. Raises InvalidGraph if a pass breaks its stage.
    """
    settings = debug.settings()
    counts: dict[str, int] = {}
    is_whole = True
    if "passes" in settings.dump:
        dump.write(gm, settings.dump_folder, ctx.graph, 0, "captured", "dense")
    for number, each in enumerate(passes, 1):
        if each.name in settings.skip:
            is_whole = False
            continue
        started = time.perf_counter()
        counts[each.name] = each(gm, ctx)
        verify(gm, each.stage if is_whole else "any", each.name)
        _tidy(gm)
        ctx.seconds[each.name] = time.perf_counter() - started
        if "passes" in settings.dump:
            dump.write(gm, settings.dump_folder, ctx.graph, number, each.name, each.stage)
    return counts


def verify(gm: fx.GraphModule, stage: str, after: str) -> None:
    """Raises InvalidGraph unless `gm` holds only what `stage` allows and is well formed."""
    try:
        gm.graph.lint()
    except (RuntimeError, ValueError, TypeError) as error:  # as torch.fx reports what is amiss
        raise InvalidGraph(after=after, stage=stage, rule=str(error)) from error
    allowed = STAGES[stage]
    for node in gm.graph.nodes:
        if _is_dialect(node) and node.target not in allowed:
            raise InvalidGraph(after=after, stage=stage, rule=f"{node.target} may not appear")
        if "sparsefx" in node.meta and "val" not in node.meta:
            raise InvalidGraph(after=after, stage=stage, rule=f"node {node.name} has no value")
        if node.op == "get_attr" and not _is_body(gm, node):
            _verify_attribute(gm, node, stage, after)


def _verify_attribute(gm: fx.GraphModule, node: fx.Node, stage: str, after: str) -> None:
    try:
        value = get_tensor(gm, str(node.target))
    except AttributeError as error:
        raise InvalidGraph(after=after, stage=stage, rule=str(error)) from error
    expected = node.meta.get("val")
    if isinstance(expected, Tensor) and value.shape != expected.shape:
        rule = f"{node.target} has shape {tuple(value.shape)}, its node {tuple(expected.shape)}"
        raise InvalidGraph(after=after, stage=stage, rule=rule)


def _is_body(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a get_attr node is a branch of control flow, which torch keeps as a submodule."""
    try:
        return is_graph(gm, str(node.target))
    except AttributeError:  # nor is its owner there
        return False


def _is_dialect(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target.namespace == "sparsefx"


def _tidy(gm: fx.GraphModule) -> None:
    remove_unused(gm, {str(node.target) for node in gm.graph.find_nodes(op="get_attr")})
    gm.recompile()
