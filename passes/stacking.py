"""Several packed linears of one input as one: whether they may be, whether that wins, the node."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import fx, nn

from sparsefx.attributes import get_tensor, set_tensor
from sparsefx.dense_weights import Stack
from sparsefx.guard import MARGIN
from sparsefx.mutation import changed_in_graph
from sparsefx.ops import linear_output
from sparsefx.passes.lower import Lower, no_baseline
from sparsefx.passes.packed_node import PackedNode, packed_stack
from sparsefx.passes.store import PackedWeight
from sparsefx.pipeline import PassContext
from sparsefx.report import Row
from sparsefx.rewrite import Site, erase
from sparsefx.target import LinearSpec


@dataclass(frozen=True)
class Stacked:
    """One packed linear to be made of `parts`, in the place of `site`.

    `interleaved`: their rows take turns. `epilogue` and `extras` are those of the new node.
    """

    site: Site
    parts: tuple[PackedNode, ...]
    interleaved: bool = False
    epilogue: str = ""
    extras: tuple[fx.Node, ...] = ()

    @property
    def ctx(self) -> PassContext:
        """That of its parts."""
        return self.parts[0].ctx

    @property
    def _stack(self) -> Stack:
        return Stack(tuple(part.weight for part in self.parts), self.interleaved)

    def node(self) -> PackedNode:
        """The node, without users, before the site's root; its weight is packed once a model."""
        first, stack = self.parts[0], self._stack
        name = self.ctx.dense.add(stack)
        tensors = packed_stack(self.ctx, stack, first.packing)
        weight = PackedWeight((name, False), first.packing, tensors)
        bias = self._bias(name)
        node = weight.call(self.site, first.x, bias, self.epilogue, self.extras)
        node.meta.pop("example_value", None)
        node.meta["sparsefx_row"] = first.node.meta["sparsefx_row"]
        if not self.interleaved:
            features = sum(part.node.meta["val"].shape[-1] for part in self.parts)
            node.meta["val"] = linear_output(first.x.meta["val"], features)
        return PackedNode(self.site.gm, node, self.ctx)

    def _bias(self, name: str) -> fx.Node | None:
        values = [part.bias.meta["val"] for part in self.parts if part.bias is not None]
        joined = self._stack.joined([value.detach() for value in values]) if values else None
        return None if joined is None else self.site.constant(f"{name}_bias", joined)

    def settle(self) -> None:
        """Notes that the node stands for its parts: in the report, and what it was made of."""
        ctx = self.ctx
        keys = [str(part.node.meta["sparsefx_row"]) for part in self.parts]
        sizes = [weight.numel() for weight, _ in self._stack.stored(ctx.dense)]
        names = [ctx.rows[key].name.rpartition(".")[2] for key in keys]
        ctx.merged[keys[0]] = {
            key: size / max(1, sum(sizes)) for key, size in zip(keys, sizes, strict=True)
        }
        for at, key in enumerate(keys):
            others = ", ".join(names[:at] + names[at + 1 :])
            ctx.rows[key] = replace(ctx.rows[key], merged=others)
        ctx.baked.update(name for name, _ in self._stack.parts)
        ctx.baked.update(str(part.bias.target) for part in self.parts if part.bias is not None)
        for stored in self._stack.stored(ctx.dense):
            ctx.weights.release((stored,), "")

    def undo(self, node: PackedNode) -> None:
        """Removes the node, and its packed weight from memory."""
        erase(node.gm, node.node)
        self.ctx.weights.release(self._stack.stored(self.ctx.dense), self._stack.order)


def kind(packed: PackedNode) -> object:
    """What two linears of one input must have in common to be stacked; None: it cannot be."""
    bias = packed.bias
    if packed.is_packed_only or packed.refusal(packed.spec(packed.packing)):
        return None  # memory="small": the model's own packed tensors would stay beside the stack
    if not _is_constant(bias):
        return None
    weight = packed.dense()
    return packed.packing, weight.shape[1], weight.dtype, weight.device, bias is None


def _is_constant(bias: fx.Node | None) -> bool:
    return bias is None or (bias.op == "get_attr" and not changed_in_graph(bias))


@dataclass
class Trials:
    """Whether stacking wins, asked of the lowering pass itself; once for equal shapes.

    It wins if the one call has a kernel and, unless guard="off", takes less time than its parts do
    as they would be lowered: each in its kernel or dense, whichever is faster.
    """

    lower: Lower
    known: dict[tuple[LinearSpec, ...], bool] = field(default_factory=dict)

    def apply(self, stacked: Stacked) -> PackedNode | None:
        """The stacked node if it wins; else None, and the graph is as it was."""
        specs = (part.spec(part.packing) for part in stacked.parts)
        key = tuple(replace(spec, density=round(spec.density, 2)) for spec in specs)
        if self.known.get(key) is False:
            return None
        node = stacked.node()
        if key not in self.known:
            self.known[key] = self._wins(node, stacked.parts)
        if not self.known[key]:
            stacked.undo(node)
            return None
        stacked.settle()
        return node

    def _wins(self, node: PackedNode, parts: Sequence[PackedNode]) -> bool:
        whole = trial(self.lower, node)
        if not whole.kernel or "dense" in whole.by_rows:
            return False  # dense at some numbers of rows: a copy of the dense weights would stay
        if not self.lower.proof:
            return True
        times = [trial(self.lower, part).chosen_us for part in parts]
        if whole.sparse_us is None or None in times:
            return False
        limit = MARGIN if whole.how == "measured" else 1.0
        return whole.sparse_us < limit * sum(time or 0.0 for time in times)


def trial(lower: Lower, packed: PackedNode) -> Row:
    """The row that `lower` would write for a node; works on a graph of that node alone."""
    gm = fx.GraphModule(nn.Module(), fx.Graph())
    inputs = {source: _input(gm, packed.gm, source) for source in packed.node.all_input_nodes}
    gm.graph.output(gm.graph.node_copy(packed.node, inputs.__getitem__))
    ctx, key = packed.ctx, str(packed.node.meta["sparsefx_row"])
    alone = PassContext(weights=ctx.weights, dense=ctx.dense, rows={key: ctx.rows[key]})
    replace(lower, baseline=no_baseline)(gm, alone)
    return alone.rows[key]


def _input(gm: fx.GraphModule, origin: fx.GraphModule, source: fx.Node) -> fx.Node:
    name = str(source.target)
    if source.op == "get_attr":
        set_tensor(gm, name, get_tensor(origin, name))
        node = gm.graph.get_attr(name)
    else:
        node = gm.graph.placeholder(source.name)
    node.meta = dict(source.meta)
    return node
