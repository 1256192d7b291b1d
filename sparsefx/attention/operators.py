"""The sparse attention operators of the dialect: their schemas, meanings and fake results."""

import torch
from torch import Tensor

from sparsefx.attention import meaning

_LIBRARY = torch.library.Library("sparsefx", "FRAGMENT")
_QKV = "Tensor q, Tensor k, Tensor v, Tensor? mask"
_SEEN = "bool is_causal, float scale, int window"

SCHEMAS = {
    "skip_softmax_attention": (
        f"{_QKV}, Tensor prefill, Tensor decode, {_SEEN}, int block_q, int block_k, str order"
    ),
    "theta_attention": (
        f"{_QKV}, Tensor lengths, Tensor theta, Tensor? lost, {_SEEN}, int topk, str placement, "
        "str denominator, bool v_mean"
    ),
    "block_attention": f"{_QKV}, Tensor keep, {_SEEN}, int block_q, int block_k",
}
"""Operator -> its arguments. A kernel's operator takes the same, then `int dense_below,
int calibrated, str handle` (`codegen`)."""


def attention_output(q: Tensor, k: Tensor, v: Tensor, *_: object) -> Tensor:
    """The fake result: [batch, heads, queries, dim of v], memory [batch, queries, heads, dim]."""
    batch, heads, queries, _dim = q.shape
    return q.new_empty((batch, queries, heads, v.shape[-1])).transpose(1, 2)


for _name, _arguments in SCHEMAS.items():
    _LIBRARY.define(f"{_name}({_arguments}) -> Tensor")
    _LIBRARY.impl(_name, getattr(meaning, _name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"sparsefx::{_name}", attention_output, lib=_LIBRARY)

SKIP_SOFTMAX = torch.ops.sparsefx.skip_softmax_attention.default
THETA = torch.ops.sparsefx.theta_attention.default
BLOCK = torch.ops.sparsefx.block_attention.default
ATTENTION_OPS = frozenset({SKIP_SOFTMAX, THETA, BLOCK})
