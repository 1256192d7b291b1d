"""Nodes of a fused attention: its mask, its operands, and what must stand around its result."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.node import Argument

from sparsefx.passes.attention_scores import Term
from sparsefx.passes.attention_spelling import step
from sparsefx.rewrite import Site
from sparsefx.shapes import same

aten = torch.ops.aten

_OF_ROOT = ("sparsefx_row", "example_value")
_VIEWS = frozenset({"view", "view_as", "as_strided"})


@dataclass(frozen=True)
class Builder:
    """Adds nodes before a site's root that have a value but are no candidates themselves."""

    site: Site

    def node(
        self, target: OpOverload, value: Tensor, *args: Argument, **kwargs: Argument
    ) -> fx.Node:
        """A call with the fake result `value`."""
        node = self.site.call(target, *args)
        node.kwargs = kwargs
        for key in _OF_ROOT:
            node.meta.pop(key, None)
        node.meta["val"] = value
        return node

    def swapped(self, x: fx.Node, first: int, second: int) -> fx.Node:
        """x with two axes exchanged."""
        value = x.meta["val"].transpose(first, second)
        return self.node(aten.transpose.int, value, x, first, second)

    def binary(self, target: OpOverload, x: fx.Node, other: fx.Node | float) -> fx.Node:
        """A broadcasting operator on x and a number or a tensor of x's dtype."""
        value = x.meta["val"]
        if isinstance(other, fx.Node):
            value = value.new_empty(broadcast(value.shape, other.meta["val"].shape))
        return self.node(target, value, x, other)

    def cast(self, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        """x in another dtype; x itself if it has that."""
        value = x.meta["val"]
        if value.dtype == dtype:
            return x
        return self.node(aten.to.dtype, torch.empty_like(value, dtype=dtype), x, dtype)

    def mask(self, terms: Sequence[Term], like: Tensor) -> fx.Node | None:
        """The terms as one mask of `like`'s dtype, or boolean where each one hides by -inf.

        A row of which every key is hidden by a finite score attends to all of them alike. The
        lowest finite number keeps that, whatever number the model has: it swallows the scores.
        """
        keep: fx.Node | None = None
        added: fx.Node | None = None
        for term in terms:
            if term.kind == "add":
                bias = self.cast(term.mask, like.dtype)
                bias = bias if term.factor == 1 else self.binary(aten.mul.Tensor, bias, term.factor)
                added = bias if added is None else self.binary(aten.add.Tensor, added, bias)
                continue
            seen = term.mask if term.kind == "keep" else self._inverted(term.mask)
            if term.fill == -math.inf:
                keep = seen if keep is None else self.binary(aten.logical_and.default, keep, seen)
            else:
                added = self._hidden(seen, added, torch.finfo(like.dtype).min, like)
        if keep is not None and added is not None:
            return self._four_axes(self._hidden(keep, added, -math.inf, like))
        return self._four_axes(keep if added is None else added)

    def _inverted(self, mask: fx.Node) -> fx.Node:
        return self.node(aten.logical_not.default, torch.empty_like(mask.meta["val"]), mask)

    def _hidden(self, seen: fx.Node, added: fx.Node | None, fill: float, like: Tensor) -> fx.Node:
        """`added` (0 if there is none) where `seen`, else `fill`."""
        if added is None:
            options: dict[str, Argument] = {"dtype": like.dtype, "device": like.device}
            added = self.node(aten.zeros.default, like.new_empty(()), [], **options)
        shape = broadcast(seen.meta["val"].shape, added.meta["val"].shape)
        return self.node(aten.where.ScalarOther, like.new_empty(shape), seen, added, fill)

    def _four_axes(self, mask: fx.Node | None) -> fx.Node | None:
        while mask is not None and mask.meta["val"].dim() < 4:
            mask = self.node(aten.unsqueeze.default, mask.meta["val"].unsqueeze(0), mask, 0)
        return mask

    def keep_views(self, result: fx.Node) -> None:
        """Gives users of the root that need its memory, [batch, heads, queries, dim], just that.

        The result lies in memory as [batch, queries, heads, dim], which not every view can split
        or merge; what was a valid view of the root is one of a contiguous tensor.
        """
        for user in list(self.site.root.users):
            if step(user) in _VIEWS:
                with self.site.gm.graph.inserting_before(user):
                    copy = self.site.gm.graph.call_function(aten.contiguous.default, (result,))
                copy.meta = {key: v for key, v in result.meta.items() if key not in _OF_ROOT}
                copy.meta["val"] = self.site.root.meta["val"]
                user.replace_input_with(self.site.root, copy)


def broadcast(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    """The shape that two shapes broadcast to; installs no guard."""
    long, short = (a, b) if len(a) >= len(b) else (b, a)
    short = (*(1 for _ in range(len(long) - len(short))), *short)
    return tuple(y if same(x, 1) else x for x, y in zip(long, short, strict=True))
