"""export_onnx(): a model as an ONNX file, its sparse weights packed, its attentions thresholded."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import fx, nn

from sparsefx import graph
from sparsefx.api.plans import check_weights
from sparsefx.api.sparse_model import decide
from sparsefx.attention.operators import ATTENTION_OPS
from sparsefx.attention.spec import default_tile
from sparsefx.attention.wanted import Wanted
from sparsefx.calibrate.batches import check_calibration
from sparsefx.codegen.onnx.at_work import effect_of_thresholds
from sparsefx.codegen.onnx.attention_functions import GAINS_NOTHING
from sparsefx.codegen.onnx.export import ExportFacts, blame
from sparsefx.codegen.onnx.export import export as write_onnx
from sparsefx.codegen.onnx.ort.library import LibraryFacts
from sparsefx.entry import inferring
from sparsefx.errors import UnknownOption
from sparsefx.passes import pipelines
from sparsefx.pipeline import PassContext, run
from sparsefx.report import Report
from sparsefx.spec import Recipe

EXPORT_GUARDS = ("measure", "off")


def export_onnx(
    model: nn.Module,
    args: tuple[object, ...],
    path: str | Path,
    *,
    kwargs: Mapping[str, object] | None = None,
    dynamic_shapes: graph.DynamicShapes = None,
    recipe: Recipe | None = None,
    calibration: Iterable[object] | None = None,
    form: str | None = None,
    library: str | Path | None = None,
    guard: str = "measure",
    check: bool = True,
    opset: int = 20,
) -> Report:
    """Writes `model` as an ONNX file with its sparse weights stored packed.

    The model is exported as it is in eval mode, whatever mode it is in, and keeps its mode. args,
    kwargs, dynamic_shapes: as torch.export takes them (an axis that is to be dynamic needs an
    example size of 2 or more). recipe, calibration: as in `compile`. form: "standard" (None) has
    standard operators only; "functions" keeps sparse linears as nodes of the domain "sparsefx",
    whose bodies are model-local functions. opset: 20 or 24. check: compare the file with PyTorch at
    the example's shapes and two others; a file that fails is not kept.

    library: also write a shared library with kernels for these nodes, for
    `SessionOptions.register_custom_ops_library` (form None is then "functions"). It is compiled by
    g++; check compares it with PyTorch as well and times it. guard: "measure" leaves a node to the
    stock runtime where the library does not make it faster at the example's shapes (with check),
    "off" takes all of them. docs/ort_library.md says more.

    Returns a Report: a row for each candidate layer, and the file's size, nodes and largest
    difference among its facts (with attention thresholds: from the thresholded graph, which is
    another function than the dense model). A stock onnxruntime gains file size from packed weights,
    not time, and nothing from thresholds; with the library it gains time. Raises
    UnknownOption, NotExportable, ExportFailed (also when torch.export cannot capture the model with
    these arguments, or without a compiler for the library), OSError, and what `compile` raises on
    bad weights and recipes.
    """
    _refuse(model, guard)
    model, wanted = _decided(model, recipe, calibration)
    kwargs = dict(kwargs or {})
    with inferring(model):
        gm, ctx, seconds = _packed(model, args, kwargs, dynamic_shapes, wanted, Path(path))
        facts = write_onnx(
            gm,
            args,
            kwargs,
            Path(path),
            reference=gm if _is_thresholded(gm) else model,
            dynamic_shapes=dynamic_shapes,
            form=form or ("standard" if library is None else "functions"),
            opset=opset,
            library=None if library is None else Path(library),
            guard=guard == "measure",
            check=check,
            progress=True,
        )
        effect = effect_of_thresholds(gm, args, kwargs) if check else None
    return _export_report(model, ctx, facts, seconds, effect)


def _refuse(model: nn.Module, guard: str) -> None:
    if not isinstance(model, nn.Module):
        raise UnknownOption(option="model", value=model, known="an nn.Module")
    if guard not in EXPORT_GUARDS:
        raise UnknownOption(option="guard", value=guard, known=", ".join(EXPORT_GUARDS))


def _decided(
    model: nn.Module, recipe: Recipe | None, calibration: Iterable[object] | None
) -> tuple[nn.Module, Wanted]:
    """The model as the recipe makes it, and the attentions that it wants sparse."""
    check_weights(model)
    batches = check_calibration(calibration)
    pipelines.check_skipped()
    if recipe is None:
        return model, Wanted()
    return decide(model, recipe, batches, default_tile("cpu"))


def _packed(
    model: nn.Module,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    dynamic_shapes: graph.DynamicShapes,
    wanted: Wanted,
    path: Path,
) -> tuple[fx.GraphModule, PassContext, float]:
    """The graph with its weights packed, what the passes noted, and the seconds that took."""
    started, ctx = time.perf_counter(), PassContext()
    with blame(path, "torch.export", "Call the model with these arguments first"):
        gm = graph.capture(model, args, kwargs, dynamic_shapes)
    run(gm, pipelines.packing(wanted.beside(model), onnx=True), ctx)
    return gm, ctx, time.perf_counter() - started


def _effect_fact(effect: float | None) -> dict[str, str]:
    """Whether the check saw thresholds at work."""
    if effect is None:
        return {}
    nothing = "none: too short to skip anything, so the check says nothing of the thresholds"
    text = f"{effect:.3g} of an attention's output" if effect else nothing
    return {"largest change by thresholds on the example": text}


def _library_facts(library: LibraryFacts | None) -> dict[str, str]:
    """What the library is, how far from PyTorch, and what it gains here."""
    if library is None:
        return {}
    facts = {"library": f"{library.path.name}, {library.kernels} kernels, {library.bytes} bytes"}
    if library.slower:
        facts["weights that the library leaves alone"] = f"{len(library.slower)}: not faster here"
    if library.stock_ms is None or library.library_ms is None:
        return facts
    gain = library.stock_ms / library.library_ms
    times = f"{library.stock_ms:.3g} without the library, {library.library_ms:.3g} with it"
    return {
        **facts,
        "largest |library - PyTorch|": f"{library.max_abs_error:.3g}",
        "ms a call": f"{times} ({gain:.2f}x; measured here, at the example's shapes)",
    }


def _is_thresholded(gm: fx.GraphModule) -> bool:
    """Whether the file is to compute something else than the dense model."""
    return any(node.target in ATTENTION_OPS for node in gm.graph.nodes)


PACKED = "stored packed in the file; a stock runtime unpacks it at load and runs it dense"
SPARSE = f"{PACKED}, one with the library registered runs it sparse"
PARTLY = f"{SPARSE} in those of its calls where that is faster (measured)"
SLOWER = f"{PACKED}, and so does one with the library: its kernel is not faster here (measured)"


def _packed_reason(name: str, library: LibraryFacts | None) -> str:
    """What becomes of a packed layer."""
    if library is None:
        return PACKED
    weight = f"{name}.weight"
    return SLOWER if weight in library.slower else PARTLY if weight in library.partly else SPARSE


def _export_report(
    model: nn.Module,
    ctx: PassContext,
    facts: ExportFacts,
    seconds: float,
    effect: float | None,
) -> Report:
    why = {"attention": GAINS_NOTHING}
    stored = {weight.name.removesuffix(".weight"): weight.stored_bytes for weight in facts.weights}
    rows = [
        replace(
            row,
            reason=row.reason or why.get(row.op, _packed_reason(row.name, facts.library)),
            stored_bytes=stored.get(row.name, row.dense_bytes),
        )
        for row in ctx.rows.values()
    ]
    error = "not checked" if facts.max_abs_error is None else f"{facts.max_abs_error:.3g}"
    return Report(
        f"{type(model).__name__} as {facts.path.name}",
        rows,
        {
            "form": facts.form,
            "opset": str(facts.opset),
            "bytes": str(facts.bytes),
            "nodes": str(facts.nodes),
            "largest |onnxruntime - PyTorch|": error,
            "input shapes checked": str(len(facts.shapes)),
            **_library_facts(facts.library),
            **_effect_fact(effect),
            "seconds in capture and passes": f"{seconds:.2f}",
            "seconds in export": f"{facts.seconds:.2f}",
        },
    )
