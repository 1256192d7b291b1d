"""K and V whose heads are repeated again, where torch's dense attention is faster that way."""

import torch
from torch import fx

from sparsefx.rewrite import Site, tensor_of
from sparsefx.shapes import hint

_repeat = torch.ops.aten.repeat_interleave.self_int


def for_dense(
    site: Site, q: fx.Node, k: fx.Node, v: fx.Node, has_mask: bool
) -> tuple[fx.Node, fx.Node, bool]:
    """K, V and `enable_gqa` for dense attention on the device of q.

    The fast backends on CUDA take a mask or groups, not both, which is why models repeat the heads
    beside a mask; on CPU groups are the faster form with and without one.
    """
    heads, kv_heads = (hint(tensor_of(each).shape[1]) for each in (q, k))
    if heads == kv_heads:
        return k, v, False
    if not has_mask or tensor_of(q).device.type != "cuda":
        return k, v, True
    first, second = (_repeated(site, each, heads // kv_heads) for each in (k, v))
    return first, second, False


def _repeated(site: Site, heads: fx.Node, times: int) -> fx.Node:
    node = site.call(_repeat, heads, times, 1)
    node.meta.pop("sparsefx_row", None)
    node.meta["val"] = tensor_of(heads).repeat_interleave(times, 1)
    return node
