"""explain(): one row for every candidate node, as text, JSON and HTML."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """What became of one candidate node (a linear, a convolution or an attention).

    name: module path, e.g. "model.layers.0.mlp.up_proj"; op: "linear", "conv", "attention";
    graph: which captured graph of the model it is in, counted from 0; shape: e.g. "1536x576 @ 128"
    (out x in @ rows of the input, "128.." where rows vary between calls);
    pattern: the sparsity found, e.g. "2:4", "unstructured 50%", "dense";
    kernel: the chosen kernel, "" where it stayed dense; times in microseconds, NaN-free, None where
    not taken; how: "measured", "modelled" or ""; error: largest |sparse - dense| over largest
    |dense| on the guard's inputs; reason: why the node stayed dense ("" only if a kernel is there).
    bytes: dense and stored bytes of the weight.
    """

    name: str
    op: str
    graph: int = 0
    shape: str = ""
    pattern: str = "dense"
    kernel: str = ""
    dense_us: float | None = None
    sparse_us: float | None = None
    how: str = ""
    error: float | None = None
    reason: str = ""
    dense_bytes: int = 0
    stored_bytes: int = 0

    @property
    def speedup(self) -> float | None:
        """dense_us / sparse_us, or None where a time is missing."""
        if self.dense_us is None or not self.sparse_us:
            return None
        return self.dense_us / self.sparse_us


@dataclass
class Report:
    """The rows of one compiled model, in graph order, plus facts that hold for all of it.

    title: e.g. the model's class; facts: label -> text (target, guard, versions, seconds).
    """

    title: str
    rows: list[Row] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
