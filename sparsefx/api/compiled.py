"""compile(): a model of the same class that runs its sparse parts on kernels where those win."""

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from torch import nn

from sparsefx.annotations import annotations, replace_attention
from sparsefx.api.plans import Request, check_memory, check_weights, mode_options, tuned_results
from sparsefx.api.runnable import runnable
from sparsefx.api.sparse_model import decide
from sparsefx.api.target_table import check_device, check_guard, choose_target
from sparsefx.attention.spec import default_tile
from sparsefx.attention.wanted import Wanted
from sparsefx.calibrate.batches import check_calibration
from sparsefx.errors import UnknownOption
from sparsefx.packed_module import with_packed_weights
from sparsefx.spec import Recipe
from sparsefx.target import Target

M = TypeVar("M", bound=nn.Module)


def compile(
    model: M,
    target: str | Target | None = None,
    *,
    recipe: Recipe | None = None,
    calibration: Iterable[object] | None = None,
    guard: str = "measure",
    mode: str | None = None,
    dynamic: bool | None = None,
    memory: str = "fast",
    tuned: str | Path | None = None,
) -> M:
    """A model of the same class that runs its sparse linears and attentions on kernels that win.

    model: any nn.Module; it is not changed, and the result shares its weights (with weights in the
    `recipe`, a pruned copy of them). target: "cpu", "cuda", "a100", "h100", "h200", "l4" or a
    Target; None takes the device the model is on. recipe: sparsity to introduce first (`sparsify`);
    without one, the zeros already in the weights are used, and thresholds that a checkpoint or
    `sparsify` left on the model. calibration: batches of model inputs (a tensor, a tuple of
    positional or a dict of keyword arguments), needed by attention thresholds. guard: "measure"
    times each kernel against dense on this device, "model" asks the roofline, "off" lowers whatever
    a kernel accepts. mode, dynamic: as in torch.compile. memory: "fast" keeps packed weights beside
    the dense ones, which run where they are faster; "small" keeps packed weights alone, so that
    memory shrinks once `model` is let go, and unpacks one for a call where no kernel is faster than
    that: for inference only, its parameters want no gradients. tuned: tuning results that
    `sparsefx bench --save` wrote on such a device, so that nothing is measured here.

    Graphs are captured and compiled when they are first called; `explain(result)` tells what became
    of each layer. Call under `torch.no_grad()`: with gradients on nothing is packed. Raises
    UnknownTarget, UnknownOption, DeviceMismatch, TargetUnavailable, NonFiniteWeight,
    EmptyCalibration, InvalidTuning and what `sparsify` raises; `model` is unchanged after any.
    """
    if not isinstance(model, nn.Module):
        raise UnknownOption(option="model", value=model, known="an nn.Module")
    chosen = choose_target(target, model)
    check_guard(guard, chosen)
    mode_options(mode)
    check_device(model, chosen, guard)
    check_weights(model)
    check_memory(memory)
    results = tuned_results(tuned)
    calibration = check_calibration(calibration)
    wanted = Wanted()
    if recipe is not None:
        model, wanted = decide(model, recipe, calibration, default_tile(chosen.device))
    if memory == "small":
        model = with_packed_weights(model, annotations(model))
    fast = runnable(model, Request(chosen, guard, mode, tuned=results), wanted, dynamic)
    if recipe is not None and recipe.attention is not None:
        replace_attention(fast, wanted.thresholds)
    return fast
