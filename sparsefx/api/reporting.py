"""explain() and pruning_report(): what became of each layer of a model."""

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from sparsefx import debug, devices
from sparsefx.annotations import annotations, pruned_layers
from sparsefx.errors import NotCompiled, UnknownOption
from sparsefx.packed_module import PackedLinear
from sparsefx.prune.allocation.costs import cost
from sparsefx.prune.layer_of import layer_of
from sparsefx.prune.report.records import PruneReport
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


def pruning_report(model: nn.Module, target: str | None = None, rows: int = 1) -> PruneReport:
    """What `sparsify` did to each weight of `model`: a PruneReport, without lines if nothing.

    target: "A100", "H100", "H200", "L4" or "cpu", to have the roofline predict the time of each
    layer there for `rows` rows of input, dense and as it is now; without a time for weights that
    are there no more. Raises UnknownOption.
    """
    _check(target, rows)
    layers = list(pruned_layers(model).values())
    facts = {"weights pruned": str(len(layers))}
    if target is not None:
        device = devices.named(target, debug.settings().cache)
        weights, patterns = prunable_weights(model), annotations(model)
        facts |= {"predicted for": f"{target}, {rows} rows of input, by the roofline"}
        for number, layer in enumerate(layers):
            if layer.name not in weights:
                continue
            shape = layer_of(weights[layer.name], layer.block)
            dense, sparse = (
                cost(pattern, shape, "time", device, rows) / 1e3
                for pattern in (None, patterns.get(layer.name))
            )
            layers[number] = replace(layer, dense_us=dense, sparse_us=sparse)
    return PruneReport(type(model).__name__, layers, facts)


def _check(target: object, rows: object) -> None:
    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
        raise UnknownOption(option="rows", value=rows, known="whole numbers from 1 on")
    if target is not None and not isinstance(target, str):
        raise UnknownOption(option="target", value=target, known='a name such as "A100" or "cpu"')


def _uncaptured(model: nn.Module, session: Session) -> list[Row]:
    """Rows of the layers that no graph has read."""
    reason = (
        "in no captured graph: its first call compiles it, unless torch.compile leaves it in eager"
    )
    dense = [
        Row(name.removesuffix(".weight"), _OPS[weight.parameter.dim()], reason=reason)
        for name, weight in prunable_weights(model).items()
        if weight.parameter not in session.seen
    ]
    return dense + [
        Row(name, "linear", reason=reason)
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear) and module.tensors[0] not in session.seen
    ]


_OPS = {2: "linear", 3: "experts", 4: "conv"}  # dimensions of a prunable weight -> op of its row
