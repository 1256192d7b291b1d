"""dense -> masked:  scaled_dot_product_attention(q, k, v, mask, is_causal, scale)
                  =>  skip_softmax_attention(q, k, v, mask, prefill, decode, is_causal, scale, ...)
                   or theta_attention(q, k, v, mask, lengths, theta, lost, is_causal, scale, ...)

For each attention that calibration found thresholds for, which become constants of the graph. Runs
after `fuse_attention`.
"""

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from torch.fx.node import Argument

from sparsefx.attention.facts import row_facts
from sparsefx.attention.operators import SKIP_SOFTMAX, THETA, attention_output
from sparsefx.attention.sites import AttentionSite, shape_text, sites
from sparsefx.attention.thresholds import AttentionThresholds, SkipThresholds, ThetaThresholds
from sparsefx.attention.wanted import Wanted
from sparsefx.passes.attention_build import Builder
from sparsefx.passes.detect import NOT_ASKED
from sparsefx.passes.grouped_heads import for_dense
from sparsefx.pipeline import PassContext
from sparsefx.rewrite import Decline, Site, arguments, erase

NO_THRESHOLDS = "attention: no thresholds were calibrated for it"
LEFT_DENSE = "attention: the recipe leaves it dense"
_NO_WINDOW = 0  # a model's own sliding window is in its mask


@dataclass(frozen=True)
class ThresholdSoftmax:
    """Lays calibrated thresholds on attentions, found by their names (`sites.attention_names`)."""

    wanted: Wanted = field(compare=False, hash=False)
    name: str = "threshold_softmax"
    stage: str = "masked"

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> int:
        """Returns how many attentions became sparse. Raises HeadsMismatch."""
        count = 0
        for node, found in sites(gm):
            sparse = self._rewritten(Site(gm, node, self.name), found, ctx)
            if isinstance(sparse, Decline):
                ctx.decline(node, sparse.reason)
                _as_written(Site(gm, node, self.name))
            else:
                count += 1
        return count

    def _rewritten(
        self, site: Site, found: AttentionSite | Decline, ctx: PassContext
    ) -> fx.Node | Decline:
        if not self.wanted:
            return Decline(NOT_ASKED)
        if isinstance(found, Decline):
            return found
        thresholds = self.wanted.of(found.name, found.heads)
        if thresholds is None:
            return Decline(LEFT_DENSE if self.wanted.leaves(found.name) else NO_THRESHOLDS)
        node = _sparse(site, found, thresholds)
        node.meta["sparsefx_calibrated_keys"] = thresholds.keys[1]
        if "sparsefx_row" in node.meta:
            facts = row_facts(thresholds, found.is_decode)
            names = {"name": found.name, "shape": shape_text(site.root)}
            ctx.update(node, pattern=_text(thresholds), **names, **facts)
        Builder(site).keep_views(node)
        site.root.replace_all_uses_with(node)
        erase(site.gm, site.root)
        return node


def _as_written(site: Site) -> None:
    """Undoes, where it would be slower dense, that `fuse_attention` grouped repeated heads."""
    q, k, v, mask, *_ = arguments(site.root)
    if site.root.meta.get("sparsefx") != "fuse_attention" or not site.root.kwargs.get("enable_gqa"):
        return
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)
    *kv, grouped = for_dense(site, q, k, v, mask is not None)
    if not grouped:
        site.root.args = (q, *kv, *site.root.args[3:])
        site.root.kwargs = {**site.root.kwargs, "enable_gqa": False}


def _sparse(site: Site, found: AttentionSite, thresholds: AttentionThresholds) -> fx.Node:
    seen: tuple[Argument, ...] = (found.is_causal, found.scale, _NO_WINDOW)
    operands = (found.q, found.k, found.v, found.mask)
    if isinstance(thresholds, SkipThresholds):
        factors = (
            _constant(site, found, "prefill", thresholds.prefill),
            _constant(site, found, "decode", thresholds.decode),
        )
        arguments = (*operands, *factors, *seen, *thresholds.tile, thresholds.order)
        node = site.call(SKIP_SOFTMAX, *arguments)
    else:
        tables = _tables(site, found, thresholds)
        options = (thresholds.k, thresholds.placement, thresholds.denominator, thresholds.v_mean)
        node = site.call(THETA, *operands, *tables, *seen, *options)
    node.meta["val"] = attention_output(*(each.meta["val"] for each in (found.q, found.k, found.v)))
    node.meta.pop("example_value", None)
    return node


def _tables(
    site: Site, found: AttentionSite, thresholds: ThetaThresholds
) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    lost = _constant(site, found, "lost", thresholds.lost) if thresholds.lost else None
    lengths = _constant(site, found, "lengths", thresholds.lengths, torch.int64)
    return lengths, _constant(site, found, "theta", thresholds.theta), lost


def _constant(
    site: Site,
    found: AttentionSite,
    what: str,
    numbers: tuple[float, ...] | tuple[int, ...] | tuple[tuple[float, ...], ...],
    dtype: torch.dtype = torch.float32,
) -> fx.Node:
    """Thresholds as a tensor beside the attention's q, named after it."""
    value: Tensor = torch.tensor(numbers, dtype=dtype, device=found.q.meta["val"].device)
    return site.constant(f"{re.sub(r'[^0-9A-Za-z_]', '_', found.name)}_{what}", value)


def _text(thresholds: AttentionThresholds) -> str:
    if isinstance(thresholds, SkipThresholds):
        rows, keys = thresholds.tile
        return f"skip-softmax {rows}x{keys}"
    return f"top-theta k={thresholds.k}"
