"""packed -> packed:  nm_linear(x, Wq), nm_linear(x, Wk), nm_linear(x, Wv)
                =>  y = nm_linear(x, [Wq; Wk; Wv]);  y[..., :q], y[..., q:q + k], y[..., q + k:]

The same for any packed linears of one input that are stored alike and have no epilogue: queries,
keys and values; keys and values of a cross-attention. Runs behind FuseEpilogue. Only where one call
takes less time than its parts, which is asked of the lowering pass.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from sparsefx.mutation import mutates_between
from sparsefx.ops import PACKED_OPS
from sparsefx.passes.lower import Lower
from sparsefx.passes.packed_node import PackedNode
from sparsefx.passes.stacking import Stacked, Trials, kind
from sparsefx.pipeline import PassContext
from sparsefx.rewrite import Site, erase

aten = torch.ops.aten


@dataclass(frozen=True)
class MergeProjections:
    """Makes one packed linear of those that read the same input, where that is faster.

    lower: the pass that will lower the result.
    """

    lower: Lower
    name: str = "merge_projections"
    stage: str = "folded"

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> int:
        """Returns how many merged linears were made."""
        trials = Trials(self.lower)
        count = 0
        for parts in list(_groups(gm, ctx)):
            site = Site(gm, parts[0].node, self.name)
            merged = trials.apply(Stacked(site, parts))
            if merged is not None:
                _share_out(site, parts, merged.node)
                count += 1
        return count


def _groups(gm: fx.GraphModule, ctx: PassContext) -> Iterator[tuple[PackedNode, ...]]:
    """Packed linears that may become one, in graph order."""
    found: dict[tuple[object, object], list[PackedNode]] = defaultdict(list)
    for node in gm.graph.nodes:
        if node.target in PACKED_OPS:
            packed = PackedNode(gm, node, ctx)
            shared = None if packed.epilogue else kind(packed)
            if shared is not None:
                found[packed.x, shared].append(packed)
    for group in found.values():
        for parts in _undisturbed(group):
            if len(parts) > 1:
                yield tuple(parts)


def _undisturbed(group: list[PackedNode]) -> Iterator[list[PackedNode]]:
    """Runs of linears between which nothing is changed in place: the first one reads x for all."""
    run = group[:1]
    for packed in group[1:]:
        if mutates_between(run[-1].node, packed.node):
            yield run
            run = []
        run.append(packed)
    yield run


def _share_out(site: Site, parts: tuple[PackedNode, ...], merged: fx.Node) -> None:
    """Each part's columns in its place: contiguous, as they were, so that any view of them holds.

    That copies nothing where there is one row, and else goes into the kernel that reads them.
    """
    start = 0
    for part in parts:
        end = start + part.node.meta["val"].shape[-1]
        columns = site.call(aten.slice.Tensor, merged, -1, start, end)
        columns.meta = _meta(part.node, site.author)
        columns.meta["val"] = merged.meta["val"][..., start:end]
        whole = site.call(aten.contiguous.default, columns)
        whole.meta = _meta(part.node, site.author)
        part.node.replace_all_uses_with(whole)
        start = end
    for part in parts:
        erase(site.gm, part.node)


def _meta(node: fx.Node, author: str) -> dict[str, object]:
    dropped = ("sparsefx_row", "sparsefx_weight", "example_value")
    return {**{k: v for k, v in node.meta.items() if k not in dropped}, "sparsefx": author}
