"""The attentions of a graph in normal form: each scaled_dot_product_attention node, read."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from sparsefx.attention.sources import cross_attention
from sparsefx.candidates import ATTENTION, attention_path, candidates
from sparsefx.rewrite import Decline, arguments
from sparsefx.shapes import always_one, hint, same, varies


@dataclass(frozen=True)
class AttentionSite:
    """One attention that thresholds may be laid on.

    name: the module it comes from ("model.layers.0.self_attn"), the key of its thresholds; q, k, v,
    mask: the nodes of its operands; is_causal: aligned to the bottom right; scale: of the scores;
    heads, kv_heads, head_dim: sizes that no call changes.
    """

    node: fx.Node
    name: str
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    is_causal: bool
    scale: float
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def queries(self) -> int:
        """Rows at the example input; 1 is decode."""
        return hint(self.q.meta["val"].shape[-2])

    @property
    def keys(self) -> int:
        """Keys at the example input."""
        return hint(self.k.meta["val"].shape[-2])

    @property
    def is_decode(self) -> bool:
        """Whether the graph has one query, whatever its other sizes."""
        return always_one(self.q.meta["val"].shape[-2])


def attention_names(gm: fx.GraphModule) -> dict[fx.Node, str]:
    """The name of each attention node: its module's path; the second of a module ends in "#2".

    It is the same through both doors; "attention" is one that the model itself calls. Hand-written
    attentions that no pass could fuse count, so that the others keep their numbers.
    """
    seen: Counter[str] = Counter()
    names = {}
    for candidate in candidates(gm):
        if candidate.op != "attention":
            continue
        path = attention_path(candidate.node)
        seen[path] += 1
        if candidate.node.target is ATTENTION:
            names[candidate.node] = path if seen[path] == 1 else f"{path}#{seen[path]}"
    return names


def sites(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, "AttentionSite | Decline"]]:
    """Each attention node of the graph with what it is, or why no thresholds may be laid on it."""
    for node, name in attention_names(gm).items():
        yield node, read(node, name)


def read(node: fx.Node, name: str) -> AttentionSite | Decline:
    """The scaled_dot_product_attention call `node` as an AttentionSite called `name`.

    Declined: other shapes than [batch, heads, length, dim], active dropout, cross-attention (told
    by `sources.cross_attention`) and is_causal where PyTorch aligns it otherwise.
    """
    q, k, v, mask, dropout, is_causal, scale, _grouped = arguments(node)
    operands = [each for each in (q, k, v) if isinstance(each, fx.Node)]
    if len(operands) < 3 or any(each.meta["val"].dim() != 4 for each in operands):
        return Decline("attention: q, k and v are not [batch, heads, length, dim]")
    if dropout:
        return Decline("attention: dropout is on, as in training")
    head_sizes = [each.meta["val"].shape[axis] for each in operands for axis in (1, 3)]
    if any(varies(size) for size in head_sizes):
        return Decline("attention: the number or the size of its heads varies")
    heads, dim, kv_heads, k_dim, v_heads, v_dim = (hint(size) for size in head_sizes)
    if (kv_heads, dim, dim) != (v_heads, k_dim, v_dim) or heads % kv_heads:
        return Decline("attention: heads or head sizes of q, k and v do not fit together")
    if is_causal and not same(*(each.meta["val"].shape[-2] for each in operands[:2])):
        return Decline(
            "attention: is_causal with other numbers of queries than keys, which PyTorch aligns to "
            "the top left"
        )
    if len({each.meta["val"].dtype for each in (node, *operands)}) > 1:
        return Decline("attention: q, k, v and the result differ in dtype, as under autocast")
    reason = cross_attention(node, operands[0], operands[1])
    if reason is not None:
        return Decline(reason)
    factor = _number(scale)
    return AttentionSite(
        node=node,
        name=name,
        q=operands[0],
        k=operands[1],
        v=operands[2],
        mask=mask if isinstance(mask, fx.Node) else None,
        is_causal=bool(is_causal),
        scale=1 / math.sqrt(dim) if factor is None else factor,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
    )


def shape_text(node: fx.Node) -> str:
    """Such as "9x64 heads (3 KV) @ 1 x 2048..": heads, their dim, queries x keys; ".." varies."""
    operands = [each for each in arguments(node)[:2] if isinstance(each, fx.Node)]
    q, k = (each.meta["val"].shape for each in operands)
    if len(q) != 4 or len(k) != 4:
        return ""
    heads, kv_heads = hint(q[1]), hint(k[1])
    grouped = f" ({kv_heads} KV)" if kv_heads != heads else ""
    return f"{heads}x{hint(q[3])} heads{grouped} @ {_length(q[2])} x {_length(k[2])}"


def _length(size: int | torch.SymInt) -> str:
    return f"{hint(size)}{'..' if varies(size) else ''}"


def _number(scale: object) -> float | None:
    """A float, also where Dynamo made a symbol of it: its value then, which guards it."""
    if isinstance(scale, fx.Node):
        return float(scale.meta["val"])
    return float(scale) if isinstance(scale, int | float) else None
