"""sparsify(): prune the weights and calibrate the attention thresholds that a recipe asks for."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from sparsefx.annotations import replace_attention
from sparsefx.api.plans import Request
from sparsefx.api.runnable import runnable
from sparsefx.api.target_table import choose_target, device_type
from sparsefx.attention.spec import default_tile
from sparsefx.attention.wanted import Wanted
from sparsefx.calibrate.attention.calibration import calibrate_attention
from sparsefx.calibrate.batches import check_calibration, check_max_memory
from sparsefx.errors import ForeignCalibration, MissingCalibration, UnknownOption
from sparsefx.passes.fuse_attention import FuseAttention
from sparsefx.prune.sparsify import prune_weights, take_over
from sparsefx.spec import Recipe

M = TypeVar("M", bound=nn.Module)


def sparsify(
    model: M,
    recipe: Recipe,
    calibration: Iterable[object] | None = None,
    *,
    inplace: bool = False,
    progress: bool = True,
    state: str | Path | None = None,
    max_memory: int | None = None,
) -> M:
    """Zeroes the weights that `recipe` prunes, calibrates its attentions, and annotates the model.

    recipe: its globs on weights are matched against parameter names
    ("model.layers.0.mlp.up_proj.weight"); the first that matches decides. A weight tied to an
    embedding, and a depthwise convolution, are selected only by a key that equals one of their
    names: "*" does not prune the embedding. Its globs on attention are matched against module names
    ("model.layers.0.self_attn"). calibration: batches of model inputs (a tensor, a tuple of
    positional or a dict of keyword arguments); attention thresholds and criteria such as Wanda and
    SparseGPT need them, Magnitude does not, but an empty one is an error all the same. Of batches
    with an `attention_mask` [batch, length], tokens at 0 do not count for weights. inplace: change
    `model` itself instead of a deep copy. progress: show bars. state: a folder that keeps what was
    found after each block of weights and each batch of attention, so that a run that was stopped
    continues to the same result; give other batches another folder. max_memory: bytes of
    activations that stay in memory while weights are pruned; the others go to temporary files.

    Under torch.distributed each process brings batches of its own, and all get the same weights.

    Returns the model; `pruning_report` tells what became of its weights, `sparsefx.annotations`
    what was decided, `compile` acts on it (eager attention stays dense). Masks and thresholds are
    deterministic. Raises UnknownOption, NothingMatches, PatternDoesNotFit, NonFiniteWeight,
    EmptyCalibration, MissingCalibration, ForeignCalibration, InvalidAllocation, ImpossibleBudget,
    and what `run_blocks` and `calibrate_attention` raise; `model` is unchanged after any of them.
    """
    if not isinstance(recipe, Recipe):
        raise UnknownOption(option="recipe", value=recipe, known="a sparsefx.Recipe")
    check_max_memory(max_memory)
    folder = _state_folder(state)
    batches = check_calibration(calibration)
    check_data(recipe, batches)
    batches = _for_all_passes(recipe, batches)
    later = inplace and bool(recipe.weights) and recipe.attention is not None
    pruned = prune_weights(
        model,
        recipe,
        batches,
        inplace=inplace and not later,  # calibrating attention may fail
        progress=progress,
        max_memory=max_memory,
        state=None if folder is None else folder / "weights",
    )
    kept = None if folder is None else folder / "attention.safetensors"
    tile = default_tile(device_type(model))
    wanted = calibrated(pruned, recipe, batches, tile, progress=progress, state=kept)
    if later:
        take_over(model, pruned)
        pruned = model
    if recipe.attention is not None:
        replace_attention(pruned, wanted.thresholds)
    return pruned


def _state_folder(state: str | Path | None) -> Path | None:
    if not isinstance(state, str | Path | None):
        raise UnknownOption(option="state", value=state, known="None, or the path of a folder")
    folder = None if state is None else Path(state)
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ForeignCalibration(path=folder, rule="it is a file, and `state` is a folder")
    return folder


def _for_all_passes(recipe: Recipe, batches: Iterable[object] | None) -> Iterable[object] | None:
    """The batches, kept where more than one pass reads what can be read only once."""
    if isinstance(batches, Iterator) and not recipe.reads_data_once:
        return list(batches)
    return batches


def decide(
    model: M, recipe: Recipe, batches: Iterable[object] | None, tile: tuple[int, int]
) -> tuple[M, Wanted]:
    """The model pruned as `recipe` says (a copy if it prunes), and the attentions it wants."""
    if not isinstance(recipe, Recipe):
        raise UnknownOption(option="recipe", value=recipe, known="a sparsefx.Recipe")
    check_data(recipe, batches)
    batches = _for_all_passes(recipe, batches)
    pruned = prune_weights(model, recipe, batches) if recipe.weights else model
    return pruned, calibrated(pruned, recipe, batches, tile)


def check_data(recipe: Recipe, batches: Iterable[object] | None) -> None:
    """Raises MissingCalibration where something is to be found from data and there is none."""
    if batches is None:
        for what in recipe.found_by_running():
            raise MissingCalibration(what=what)


def calibrated(
    model: nn.Module,
    recipe: Recipe,
    batches: Iterable[object] | None,
    tile: tuple[int, int],
    *,
    progress: bool = True,
    state: Path | None = None,
) -> Wanted:
    """Which attentions of `model` are to be sparse, calibrated on `batches` if there are any."""
    if recipe.attention is None or batches is None:
        return Wanted({}, recipe, tile)
    found = calibrate_attention(
        model,
        recipe,
        batches,
        prepare=(FuseAttention(),),
        tile=tile,
        state=state,
        progress=progress,
        build=lambda found: _without_guard(model, Wanted(found, None, tile)),
    )
    return Wanted(found, recipe, tile)


def _without_guard(model: M, wanted: Wanted) -> M:
    """The model with all thresholds at work: a metric is about what it computes, not how fast."""
    target = choose_target(None, torch.device(device_type(model)))
    return runnable(model, Request(target, "off"), wanted)
