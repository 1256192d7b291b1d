"""The table sparse attention operator -> ONNX function: its meaning in standard operators.

    SkipSoftmaxAttention <is_causal, scale, window, block_q, block_k, order>
        (q, k, v, mask?, prefill, decode) => y
    ThetaAttention <is_causal, scale, window, topk, placement, denominator, v_mean>
        (q, k, v, mask?, lengths, theta, lost?) => y
    BlockAttention <is_causal, scale, window, block_q, block_k>
        (q, k, v, mask?, keep) => y

Inputs, attributes and meaning are those of the dialect (`sparsefx.attention.meaning`); an absent
mask is the empty input "". A body computes in float32, returns q's dtype and reads every size at
run time, so that it serves all batches and lengths, one query included. Its overload says which.

Where it may differ from PyTorch: of a row with a NaN score a maximum may be a number, because the
standard leaves it open and onnxruntime passes over some NaN; a tile may then be dropped that
PyTorch keeps. Rows see at most 2^24 keys, up to which float32 counts.
"""

from dataclasses import dataclass

import onnx_ir as ir

from sparsefx.codegen.onnx import attention_text as text
from sparsefx.codegen.onnx.functions import function

SKIP_SOFTMAX, THETA, BLOCK = "SkipSoftmaxAttention", "ThetaAttention", "BlockAttention"

GAINS_NOTHING = (
    "a stock ONNX runtime computes every tile and gains no time from sparse attention; "
    'form="functions" keeps it one node, which a runtime with a kernel of that name may take'
)

_HEADS = {
    SKIP_SOFTMAX: (
        "<is_causal, scale, window, block_q, block_k, order> (q, k, v, mask, prefill, decode)"
    ),
    THETA: (
        "<is_causal, scale, window, topk, placement, denominator, v_mean> "
        "(q, k, v, mask, lengths, theta, lost)"
    ),
    BLOCK: "<is_causal, scale, window, block_q, block_k> (q, k, v, mask, keep)",
}


@dataclass(frozen=True)
class AttentionVariant:
    """Which body an attention node needs.

    phase: "decode" (one query), "prefill" (a fixed number above one) or "any", read by skip-softmax
    only, "" elsewhere; grouped: whether query heads share K and V; mask: its dtype or None.
    options: `order` of skip-softmax; placement, denominator and "v_mean" or "" of theta.
    """

    name: str
    dtype: ir.DataType
    phase: str
    grouped: bool
    mask: ir.DataType | None
    is_causal: bool
    has_window: bool
    options: tuple[str, ...] = ()

    @property
    def overload(self) -> str:
        """An identifier of all the body depends on: "any_grouped_causal_sink_diagonal_float"."""
        words = (
            self.phase,
            "grouped" if self.grouped else "",
            "causal" if self.is_causal else "",
            "window" if self.has_window else "",
            f"mask_{self.mask.name.lower()}" if self.mask else "",
            *self.options,
            self.dtype.name.lower(),
        )
        return "_".join(word for word in words if word)

    @property
    def is_narrow(self) -> bool:
        """Whether inputs must be widened to float32."""
        return self.dtype is not ir.DataType.FLOAT

    def wide(self, name: str) -> str:
        """The name of q, k, v or y in float32."""
        return f"{name}_float" if self.is_narrow else name

    @property
    def by_group(self) -> bool:
        """Whether the rows of s are the heads that share K, and not queries."""
        return self.grouped and self.phase == "decode"


def attention(variant: AttentionVariant, opset: int) -> ir.Function:
    """The function of a sparse attention."""
    lines = [*_scores(variant), *_BODIES[variant.name](variant)]
    if variant.is_narrow:
        lines = [f"{x}_float = Cast <to = 1> ({x})" for x in "qkv"] + lines
        lines.append(f"y = Cast <to = {variant.dtype.value}> (y_float)")
    head = f"{variant.name} {_HEADS[variant.name]} => (y)"
    return function(head, [text.with_shared(lines)], opset, variant.overload)


def _scores(variant: AttentionVariant) -> list[str]:
    """s: Q K^T, scaled, then what hides keys."""
    product = text.FOLDED_PRODUCT if variant.grouped else text.PRODUCT
    lines = [product.format(q=variant.wide("q"), k=variant.wide("k"))]
    steps = ["Mul (s_raw, scale)"]
    if variant.mask not in (None, ir.DataType.BOOL):
        lines.append("mask_float = Cast <to = 1> (mask)")
        steps.append("Add ({s}, mask_float)")
    conditions = _conditions(variant)
    for i, condition in enumerate(conditions[1:], start=1):
        lines.append(f"is_shown_{i} = And ({conditions[i - 1]}, {condition})")
        conditions[i] = f"is_shown_{i}"
    if conditions:
        steps.append(f"Where ({conditions[-1]}, {{s}}, never)")
    if variant.by_group:
        steps.append("Reshape ({s}, by_group)")
    names = [*(f"s_{i}" for i in range(1, len(steps))), "s"]
    made = zip(names, steps, ["s_raw", *names], strict=False)
    return lines + [f"{name} = {step.format(s=before)}" for name, step, before in made]


def _conditions(variant: AttentionVariant) -> list[str]:
    """Bool values, [queries, keys] in their last axes, that are all True where a key is seen."""
    return [
        *(["mask"] if variant.mask is ir.DataType.BOOL else []),
        *(["is_behind"] if variant.is_causal else []),
        *(["is_near"] if variant.has_window else []),
    ]


def _skip_softmax(variant: AttentionVariant) -> list[str]:
    factor = "factor" if variant.phase == "any" else variant.phase
    limits_size = "groups_first" if variant.by_group else "heads_first"
    return [
        text.TILE_MAXIMA,
        text.VISITS[variant.options[0]],
        text.RUNNING_MAXIMA,
        text.SKIPPED_ROWS.format(factor=factor, limits_size=limits_size),
        *_votes(variant),
        "s_kept = Where (is_dropped_element, never, s)",
        text.SOFTMAX,
        _times_v("p", variant.wide("y"), variant),
    ]


def _votes(variant: AttentionVariant) -> list[str]:
    """is_dropped_element, like s, from is_skipped: what each row would do with each tile."""
    to_elements = text.OVER_KEYS.format
    if variant.phase == "decode" and not variant.grouped:
        return [to_elements(elements="is_dropped_element", rows="is_skipped")]
    if variant.phase == "decode":
        lines = [text.VOTE_OF_GROUP, text.DECIDED.format(agreed="agreed")]
        return [*lines, to_elements(elements="is_dropped_element", rows="is_dropped")]
    heads_vote = variant.phase == "any" and variant.grouped
    return [
        text.VOTE_OF_ROWS,
        *([text.VOTE_OF_HEADS] if heads_vote else []),
        text.DECIDED.format(agreed="agreed" if heads_vote else "agreed_by_rows"),
        text.OVER_QUERIES.format(rows="is_dropped_row", tiles="is_dropped"),
        to_elements(elements="is_dropped_element", rows="is_dropped_row"),
    ]


def _block(variant: AttentionVariant) -> list[str]:
    return [
        text.OVER_QUERIES.format(rows="is_kept_row", tiles="keep"),
        text.OVER_KEYS.format(elements="is_kept", rows="is_kept_row"),
        "s_kept = Where (is_kept, s, never)",
        text.SOFTMAX,
        _times_v("p", variant.wide("y"), variant),
    ]


def _theta(variant: AttentionVariant) -> list[str]:
    placement, denominator, v_mean = variant.options
    estimate = text.ESTIMATE.get(denominator)
    lines = [text.SEEN, text.TABLE_PLACE, text.TABLE_VALUE.format(table="theta"), text.WEIGHT]
    if placement == "post" or denominator == "exact":
        compared = "dense" if placement == "post" else "s"
        lines += [
            text.WEIGHT_TOTAL.format(total="total", weights="weight"),
            text.NORMALISED.format(p="dense", weights="weight"),
            text.KEPT.format(compared=compared, kept="p", value="dense"),
        ]
    else:
        total = "kept_total" if estimate else "total"
        lines += [
            text.KEPT.format(compared="s", kept="kept_weight", value="weight"),
            text.WEIGHT_TOTAL.format(total=total, weights="kept_weight"),
            *([text.MISSING.format(estimate=estimate)] if estimate else []),
            text.NORMALISED.format(p="p", weights="kept_weight"),
        ]
    if not v_mean:
        return [*lines, _times_v("p", variant.wide("y"), variant)]
    products = (_times_v("p", "product", variant), _times_v("seen", "v_total", variant))
    return [*lines, *products, text.V_MEAN.format(y=variant.wide("y"))]


_BODIES = {SKIP_SOFTMAX: _skip_softmax, THETA: _theta, BLOCK: _block}


def _times_v(x: str, y: str, variant: AttentionVariant) -> str:
    """y [batch, heads, queries, dim] = x V."""
    product = text.FOLDED_TIMES_V if variant.grouped else text.TIMES_V
    return product.format(x=x, y=y, v=variant.wide("v"))
