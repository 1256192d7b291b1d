"""compile, sparsify, export_onnx, explain, the torch.compile backend: the module that joins all."""

import contextlib
import copy
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, fx, nn

from sparsefx import debug, graph
from sparsefx import guard as guards
from sparsefx.annotations import annotations
from sparsefx.attributes import count_nonfinite
from sparsefx.codegen.cpp import TARGET_KERNELS as CPP_KERNELS
from sparsefx.codegen.onnx.export import ExportFacts, blame
from sparsefx.codegen.onnx.export import export as write_onnx
from sparsefx.codegen.triton.kernels import kernels as triton_kernels
from sparsefx.compiler import Compiler, Plan, inductor
from sparsefx.devices import nearest
from sparsefx.errors import (
    DeviceMismatch,
    EmptyCalibration,
    NonFiniteWeight,
    NotCompiled,
    TargetUnavailable,
    UnknownOption,
    UnknownTarget,
)
from sparsefx.passes import pipelines
from sparsefx.passes.apply_recipe import ApplyRecipe
from sparsefx.passes.lower import Judge
from sparsefx.pipeline import PassContext, run
from sparsefx.prune.sparsify import sparsify
from sparsefx.prune.weights import prunable_weights
from sparsefx.report import Report, Row
from sparsefx.session import Session, continued, recall, remember_model
from sparsefx.spec import Recipe
from sparsefx.target import LinearSpec, Lowering, Target
from sparsefx.variants import Compiled

GUARDS = ("measure", "model", "off")
M = TypeVar("M", bound=nn.Module)


@functools.cache
def targets() -> Mapping[str, Target]:
    """The targets by name. "a100" and its like plan for a GPU that need not be present."""
    cuda = triton_kernels()
    planned = {name: Target(name, "cuda", cuda, name) for name in ("a100", "h100", "h200", "l4")}
    return {
        "cpu": Target("cpu", "cpu", CPP_KERNELS),
        "cuda": Target("cuda", "cuda", cuda),
        **planned,
    }


def compile(
    model: M,
    target: str | Target | None = None,
    *,
    recipe: Recipe | None = None,
    calibration: Iterable[object] | None = None,
    guard: str = "measure",
    mode: str | None = None,
    dynamic: bool | None = None,
) -> M:
    """A model of the same class that runs its sparse linears on kernels where those win.

    model: any nn.Module; it is not changed, and the result shares its weights (with a `recipe`, a
    pruned copy of them). target: "cpu", "cuda", "a100", "h100", "h200", "l4" or a Target; None
    takes the device the model is on. recipe: sparsity to introduce first (`sparsify`); without one,
    the zeros already in the weights are used. guard: "measure" times each kernel against dense on
    this device, "model" asks the roofline, "off" lowers whatever a kernel accepts. mode, dynamic:
    as in torch.compile.

    Graphs are captured and compiled when they are first called; `explain(result)` tells what became
    of each layer. Call under `torch.no_grad()`: with gradients on nothing is packed. Raises
    UnknownTarget, UnknownOption, DeviceMismatch, TargetUnavailable, NonFiniteWeight,
    EmptyCalibration and what `sparsify` raises; `model` is unchanged after any of them.
    """
    if not isinstance(model, nn.Module):
        raise UnknownOption(option="model", value=model, known="an nn.Module")
    chosen = _target(target, model)
    _check_guard(guard, chosen)
    _mode_options(mode)
    _check_device(model, chosen, guard)
    _check_weights(model)
    if recipe is not None:
        model = sparsify(model, recipe, calibration)
    elif calibration is not None and not any(True for _ in calibration):
        raise EmptyCalibration()
    session = Session(type(model).__name__, chosen.name, guard)
    trained = frozenset(annotations(model))
    compiler = Compiler(_plan(chosen, guard, mode, None, trained), session)
    fast = _shell(model)
    traced = torch.compile(_entry(fast), backend=compiler, dynamic=dynamic)
    fast._compiled_call_impl = traced  # what nn.Module.compile sets, and __call__ runs
    remember_model(fast, session)
    return fast


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Tensor],
    *,
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
) -> Compiled:
    """The torch.compile backend "sparsefx".

    options: "recipe" (a Recipe), "guard", "target" as in `compile`, and "inductor", a dict of
    settings for Inductor. `explain(compiled_model)` works on the result of torch.compile. Raises
    UnknownOption, UnknownTarget, TargetUnavailable (torch wraps them in BackendCompilerFailed).
    """
    given = dict(options or {})
    recipe, guard = given.pop("recipe", None), given.pop("guard", "measure")
    target, settings = given.pop("target", None), given.pop("inductor", None)
    if given:
        known = "recipe, guard, target, inductor"
        raise UnknownOption(option="options", value=sorted(given)[0], known=known)
    chosen = _target(target, _device_of(example_inputs))
    _check_guard(guard, chosen)
    asked = f"{chosen.name} {guard} {mode} {recipe!r} {settings!r}"
    session = continued(example_inputs, asked)
    session = session or Session("torch.compile", chosen.name, str(guard), asked)
    plan = _plan(chosen, str(guard), mode, recipe, frozenset(), settings)
    if isinstance(recipe, Recipe):
        session.globs = tuple(recipe.weights)
    return Compiler(plan, session)(gm, example_inputs)


def export_onnx(
    model: nn.Module,
    args: tuple[object, ...],
    path: str | Path,
    *,
    kwargs: Mapping[str, object] | None = None,
    dynamic_shapes: graph.DynamicShapes = None,
    recipe: Recipe | None = None,
    calibration: Iterable[object] | None = None,
    form: str = "standard",
    check: bool = True,
    opset: int = 20,
) -> Report:
    """Writes `model` as an ONNX file with its sparse weights stored packed.

    The model is exported as it is in eval mode, whatever mode it is in, and keeps its mode. args,
    kwargs, dynamic_shapes: as torch.export takes them (an axis that is to be dynamic needs an
    example size of 2 or more). recipe, calibration: as in `compile`. form: "standard" has standard
    operators only; "functions" keeps sparse linears as nodes of the domain "sparsefx", whose bodies
    are model-local functions. opset: 20 or 24. check: compare the file with PyTorch at the
    example's shapes and two others; a file that fails is not kept.

    Returns a Report: a row for each candidate layer, and the file's size, nodes and largest
    difference among its facts. A stock onnxruntime gains file size from this, not time. Raises
    UnknownOption, NotExportable, ExportFailed (also when torch.export cannot capture the model with
    these arguments), OSError, and what `compile` raises on bad weights and recipes.
    """
    if not isinstance(model, nn.Module):
        raise UnknownOption(option="model", value=model, known="an nn.Module")
    _check_weights(model)
    if recipe is not None:
        model = sparsify(model, recipe, calibration)
    elif calibration is not None and not any(True for _ in calibration):
        raise EmptyCalibration()
    pipelines.check_skipped()
    kwargs = dict(kwargs or {})
    started = time.perf_counter()
    with _inferring(model):
        with blame(Path(path), "torch.export", "Call the model with these arguments first"):
            gm = graph.capture(model, args, kwargs, dynamic_shapes)
        ctx = PassContext()
        run(gm, pipelines.packing(), ctx)
        seconds = time.perf_counter() - started
        facts = write_onnx(
            gm,
            args,
            kwargs,
            Path(path),
            reference=model,
            dynamic_shapes=dynamic_shapes,
            form=form,
            opset=opset,
            check=check,
            progress=True,
        )
    return _export_report(model, ctx, facts, seconds)


@contextlib.contextmanager
def _inferring(model: nn.Module) -> Iterator[None]:
    """The model in eval mode: a file with dropout in it computes something else at each call."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _export_report(
    model: nn.Module, ctx: PassContext, facts: ExportFacts, seconds: float
) -> Report:
    packed = "stored packed in the file; a stock runtime unpacks it at load and runs it dense"
    stored = {weight.name.removesuffix(".weight"): weight.stored_bytes for weight in facts.weights}
    rows = [
        replace(
            row, reason=row.reason or packed, stored_bytes=stored.get(row.name, row.dense_bytes)
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
            "seconds in capture and passes": f"{seconds:.2f}",
            "seconds in export": f"{facts.seconds:.2f}",
        },
    )


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


def _target(target: object, place: nn.Module | torch.device) -> Target:
    if isinstance(target, Target):
        return target
    name = _model_device(place) if target is None else target
    if not isinstance(name, str) or name not in targets():
        raise UnknownTarget(name=name, known=", ".join(targets()))
    return targets()[name]


def _model_device(place: nn.Module | torch.device) -> str:
    if isinstance(place, torch.device):
        return place.type
    first = next(place.parameters(), None)
    return "cpu" if first is None else first.device.type


def _device_of(inputs: Sequence[object]) -> torch.device:
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    parameters = [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]
    return (parameters or tensors)[0].device if tensors else torch.device("cpu")


def _check_guard(guard: object, target: Target) -> None:
    if guard not in GUARDS:
        raise UnknownOption(option="guard", value=guard, known=", ".join(GUARDS))
    if guard == "measure" and (target.roofline or not target.present()):
        raise TargetUnavailable(name=target.name, device=target.roofline or target.device)


def _check_device(model: nn.Module, target: Target, guard: str) -> None:
    """A model elsewhere than its target can only be planned for, and only if that is absent."""
    device = _model_device(model)
    planning = guard == "model" and device == "cpu"
    if device != target.device and not planning:
        raise DeviceMismatch(
            model_device=device, name=target.name, device=target.device, suggestion=device
        )


def _check_weights(model: nn.Module) -> None:
    for name, weight in prunable_weights(model).items():
        if bad := count_nonfinite(weight.parameter):
            raise NonFiniteWeight(name=name, count=bad)


def _plan(
    target: Target,
    guard: str,
    mode: str | None,
    recipe: object,
    trained: frozenset[str],
    settings: object = None,
) -> Plan:
    pipelines.check_skipped()
    passes = pipelines.inference(target, _judge(target, guard), proof=guard != "off")
    if isinstance(recipe, Recipe):
        passes = (ApplyRecipe(recipe), *passes)
    elif recipe is not None:
        raise UnknownOption(option="recipe", value=recipe, known="a sparsefx.Recipe")
    patches = _mode_options(mode)
    if isinstance(settings, Mapping):
        patches.update(settings)
    elif settings is not None:
        raise UnknownOption(option="inductor", value=settings, known="a dict of settings")
    train = pipelines.training(trained)
    return Plan(passes, train, inductor(patches), has_recipe=recipe is not None)


def _mode_options(mode: str | None) -> dict[str, object]:
    if not mode:
        return {}
    from torch._inductor import list_mode_options  # slow to import, seldom needed

    modes = list_mode_options()
    if mode not in modes:
        raise UnknownOption(option="mode", value=mode, known=", ".join(modes))
    return dict(modes[mode])


def _judge(target: Target, guard: str) -> Judge:
    cache = debug.settings().cache

    def measured(
        spec: LinearSpec, weight: Tensor, bias: Tensor | None, lowering: Lowering
    ) -> guards.Verdict:
        return guards.measure(spec, weight, bias, lowering, device=weight.device, cache=cache)

    def modelled(
        spec: LinearSpec, weight: Tensor, bias: Tensor | None, lowering: Lowering
    ) -> guards.Verdict:
        device = target.roofline or nearest(target.device)
        return guards.model(spec, device, cache=cache)

    return measured if guard == "measure" else modelled


def _entry(model: nn.Module) -> Callable[..., object]:
    """The model's call as a function of ours, with a code object of its own.

    Dynamo skips frames of torch itself, such as the forward of nn.Sequential, and counts recompiles
    by code object: models that shared one would use up each other's limit.
    """

    def call(*args: object, **kwargs: object) -> object:
        return model._call_impl(*args, **kwargs)

    # The name is that of a model: torch remembers sizes that vary by file, line and name.
    name = f"call_{type(model).__name__}_{id(model):x}"
    call.__code__ = call.__code__.replace(co_name=name)
    return call


def _shell(model: M) -> M:
    """A model of the same class over the same submodules and weights, to be compiled alone."""
    shell = copy.copy(model)
    for table in ("_modules", "_parameters", "_buffers"):
        shell.__dict__[table] = dict(model.__dict__[table])
    return shell
