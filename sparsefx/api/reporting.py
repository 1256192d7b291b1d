"""explain(): what became of each layer of a compiled model."""

from collections.abc import Callable

from torch import nn

from sparsefx.errors import NotCompiled
from sparsefx.prune.weights import prunable_weights
from sparsefx.report import Report, Row
from sparsefx.session import Session, recall


def explain(compiled: Callable[..., object]) -> Report:
    """What became of each candidate layer of a compiled model: a Report.

    compiled: the model that `sparsefx.compile` or `torch.compile(backend="sparsefx")` returned, of
    which torch's types say only that it can be called. Before its first call the rows say that
    nothing was captured yet. Raises NotCompiled.
    """
    if not isinstance(compiled, nn.Module):
        raise NotCompiled(what=f"this {type(compiled).__name__}")
    original = compiled._modules.get("_orig_mod") or compiled
    session = recall(compiled) or recall(original)
    if session is None:
        raise NotCompiled(what=f"this {type(compiled).__name__}")
    report = session.report()
    return Report(report.title, [*report.rows, *_uncaptured(original, session)], report.facts)


def _uncaptured(model: nn.Module, session: Session) -> list[Row]:
    """Rows of the layers that no graph has read."""
    reason = (
        "in no captured graph: its first call compiles it, unless torch.compile leaves it in eager"
    )
    return [
        Row(name.removesuffix(".weight"), _OPS[weight.parameter.dim()], reason=reason)
        for name, weight in prunable_weights(model).items()
        if weight.parameter not in session.seen
    ]


_OPS = {2: "linear", 4: "conv"}  # dimensions of a prunable weight -> op of its row
