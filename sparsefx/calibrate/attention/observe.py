"""A pass that lets calibration see the operands of every attention, and change its result."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, fx
from torch.fx.node import Argument

from sparsefx.attention.sites import AttentionSite, sites
from sparsefx.pipeline import PassContext

Observer = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor], Tensor]
"""(q, k, v, mask, dense result) -> the result to go on with."""


@dataclass(frozen=True)
class ObserveAttention:
    """Puts an observer behind each attention for which `watch` gives one."""

    watch: Callable[[AttentionSite], Observer | None]
    name: str = "observe_attention"
    stage: str = "dense"

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> int:
        """Returns how many attentions are observed."""
        found = [site for _, site in sites(gm) if isinstance(site, AttentionSite)]
        return sum(self._insert(gm, site) for site in found)

    def _insert(self, gm: fx.GraphModule, site: AttentionSite) -> int:
        observer = self.watch(site)
        if observer is None:
            return 0
        args: tuple[Argument, ...] = (site.q, site.k, site.v, site.mask, site.node)
        with gm.graph.inserting_after(site.node):
            node = gm.graph.call_function(observer, args)
        node.meta = dict(site.node.meta)
        site.node.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
        return 1
