"""packed -> packed:  silu(nm_linear(x, G)) * nm_linear(x, U)  =>  nm_linear(x, W, "gate_silu")

where the rows of W are G0, U0, G1, U1, ...: one call that never stores gate nor up. The same for
relu and gelu, and with further steps behind the product. Runs behind FuseEpilogue, which has moved
activation and product into one of the two linears. Only where one call takes less time than two,
which is asked of the lowering pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from sparsefx.epilogue import ACTIVATIONS, BINARY, Step, join, parse
from sparsefx.mutation import mutates_between
from sparsefx.ops import PACKED_OPS
from sparsefx.passes.lower import Lower
from sparsefx.passes.packed_node import PackedNode
from sparsefx.passes.stacking import Stacked, Trials, kind
from sparsefx.pipeline import PassContext
from sparsefx.rewrite import Site, erase


@dataclass(frozen=True)
class FuseGatedMLP:
    """Makes one packed linear of gate and up, where that is faster.

    lower: the pass that will lower the result.
    """

    lower: Lower
    name: str = "fuse_gated_mlp"
    stage: str = "folded"

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> int:
        """Returns how many pairs became one."""
        trials = Trials(self.lower)
        count = 0
        for pair in list(_pairs(gm, ctx)):
            last = pair.last.node
            site = Site(gm, last, self.name)
            parts = (pair.gate, pair.up)
            fused = trials.apply(Stacked(site, parts, True, pair.epilogue, pair.extras))
            if fused is not None:
                last.replace_all_uses_with(fused.node)
                erase(gm, last)
                count += 1
        return count


@dataclass(frozen=True)
class _Pair:
    """act(gate) * up and the steps behind it; `last` is the one of the two that computes it."""

    gate: PackedNode
    up: PackedNode
    last: PackedNode
    epilogue: str
    extras: tuple[fx.Node, ...]


def _pairs(gm: fx.GraphModule, ctx: PassContext) -> Iterator[_Pair]:
    for node in gm.graph.nodes:
        if node.target in PACKED_OPS:
            pair = _pair(PackedNode(gm, node, ctx))
            if pair is not None and _fits(pair):
                yield pair


def _pair(last: PackedNode) -> _Pair | None:
    """The product in a linear's epilogue: of its own activation, or of another's output's."""
    match parse(last.epilogue):
        case (Step(op="mul", operand=int(at)), *further):
            other = _linear(last, at)
            steps = parse(other.epilogue) if other else ()
            if other and len(steps) == 1 and steps[0].op in ACTIVATIONS:
                return _Pair(other, last, last, *_behind(last, at, steps[0].op, further))
        case (Step(op=activation), Step(op="mul", operand=int(at)), *further):
            other = _linear(last, at)
            if activation in ACTIVATIONS and other and not other.epilogue:
                return _Pair(last, other, last, *_behind(last, at, activation, further))
    return None


def _linear(last: PackedNode, at: int) -> PackedNode | None:
    """The operand at a place if it is a packed linear that nothing else reads."""
    node = last.extras[at]
    if node.target not in PACKED_OPS or len(node.users) != 1 or last.extras.count(node) != 1:
        return None
    return PackedNode(last.gm, node, last.ctx)


def _behind(
    last: PackedNode, at: int, activation: str, further: list[Step]
) -> tuple[str, tuple[fx.Node, ...]]:
    """The gate and the steps behind it, whose operands are numbered without the one at a place."""
    extras = (*last.extras[:at], *last.extras[at + 1 :])
    steps = [Step(f"gate_{activation}"), *(_renumbered(step, at) for step in further)]
    return join(steps), extras


def _renumbered(step: Step, removed: int) -> Step:
    if step.op in BINARY and isinstance(step.operand, int) and step.operand > removed:
        return Step(step.op, step.operand - 1)
    return step


def _fits(pair: _Pair) -> bool:
    gate, up = pair.gate, pair.up
    other = up if pair.last is gate else gate
    if gate.x is not up.x or mutates_between(other.node, pair.last.node):
        return False
    if kind(gate) is None or kind(gate) != kind(up) or gate.packing.layout == "block":
        return False  # rows that take turns are no blocks any more
    return gate.dense().shape == up.dense().shape
