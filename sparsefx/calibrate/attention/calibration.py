"""Calibration of attention: one dense pass over the data, then thresholds under a budget."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from sparsefx.attention.spec import AttentionPattern, SkipSoftmax, Theta
from sparsefx.attention.thresholds import AttentionThresholds
from sparsefx.calibrate.attention import state as states
from sparsefx.calibrate.attention.observe import ObserveAttention
from sparsefx.calibrate.attention.skips import LEAST_TILES
from sparsefx.calibrate.attention.solve import solve
from sparsefx.calibrate.attention.survey import Survey
from sparsefx.calibrate.attention.within import Build, back_off
from sparsefx.calibrate.digest import digest
from sparsefx.calibrate.door import call_with, through_passes
from sparsefx.entry import inferring
from sparsefx.errors import AttentionNotFound, EmptyCalibration, ShortCalibration
from sparsefx.pipeline import Pass
from sparsefx.spec import Recipe


def calibrate_attention(
    model: nn.Module,
    recipe: Recipe,
    batches: Iterable[object],
    *,
    prepare: Sequence[Pass] = (),
    tile: tuple[int, int],
    state: Path | None = None,
    progress: bool = True,
    build: Build | None = None,
) -> dict[str, AttentionThresholds]:
    """Thresholds of every attention that `recipe` makes sparse, by attention name.

    model: run densely, in eval mode and without gradients, on each batch; not changed. batches: a
    Tensor, a tuple or list of positional, or a mapping of keyword arguments each, on the model's
    device. prepare: passes that bring attentions into the form that `attention.sites` reads. tile:
    (query rows, keys) where the recipe names none. state: a file that keeps the statistics after
    each batch of one model, recipe and list of batches; a calibration that was stopped goes on from
    it and gives the same thresholds bit for bit, and a finished one answers another goal (sparsity,
    error, `per`) without running the model. progress: show a bar with the time left. build: makes a
    runnable sparse model of thresholds, for recipes with a `metric` of their own (at most 6
    evaluations); without it no metric is asked.

    Raises EmptyCalibration, ShortCalibration (no input of 4 key tiles), AttentionNotFound (a key of
    the recipe matches nothing), NonFiniteAttention, ForeignCalibration (the state belongs to
    another calibration), and whatever the model raises.
    """
    survey = survey_attention(
        model, recipe, batches, prepare=prepare, tile=tile, state=state, progress=progress
    )
    found: dict[str, AttentionThresholds] = {
        name: each.thresholds() for name, each in survey.thetas().items()
    }
    for spec in dict.fromkeys(recipe.attention_patterns()):
        if isinstance(spec, SkipSoftmax):
            sites = survey.of(spec)
            found |= solve(spec, sites)
            if spec.metric is not None and spec.factors is None and build is not None:
                found = back_off(model, spec, sites, found, build)
    return {name: found[name] for name in survey.names if name in found}


def survey_attention(
    model: nn.Module,
    recipe: Recipe,
    batches: Iterable[object],
    *,
    prepare: Sequence[Pass] = (),
    tile: tuple[int, int],
    state: Path | None = None,
    progress: bool = True,
) -> Survey:
    """The pass over the data of `calibrate_attention`, of which any goal can be answered."""
    survey = Survey(recipe, tile)
    identity = _digest(model, recipe, prepare, tile)
    saved = None if state is None else states.read(state, identity)
    if saved is not None:
        survey.restore(saved)
    function = through_passes(model, (*prepare, ObserveAttention(survey.watch)))
    done, last = survey.batch, None
    with inferring(model), torch.no_grad():
        bar = tqdm(batches, desc="calibrate attention", unit="batch", disable=not progress)
        for number, last in enumerate(bar):
            if number < done:
                continue
            call_with(function, last)
            survey.batch = number + 1
            if state is not None:
                states.write(state, identity, survey.saved())
        if not survey.batch:
            raise EmptyCalibration()
        _check(survey, recipe, type(model).__name__)
        if survey.thetas() and last is not None:
            survey.measuring = True
            call_with(function, last)
    return survey


def _check(survey: Survey, recipe: Recipe, model: str) -> None:
    attention = recipe.attention
    for key in attention if isinstance(attention, Mapping) else ("*",):
        if not any(fnmatchcase(name, key) for name in survey.names):
            examples = ", ".join(survey.names[:3]) or "none"
            raise AttentionNotFound(key=key, model=model, examples=examples)
    for spec in recipe.attention_patterns():
        if not isinstance(spec, SkipSoftmax) or spec.factors is not None:
            continue
        for name, each in survey.of(spec).items():
            if each.keys[1] < LEAST_TILES * each.tile[1]:
                raise ShortCalibration(
                    name=name, keys=each.keys[1], tile=each.tile[1], least=LEAST_TILES
                )


def _digest(
    model: nn.Module, recipe: Recipe, prepare: Sequence[Pass], tile: tuple[int, int]
) -> str:
    """Of what the statistics depend on: a sample of each weight stands for it; not of the data."""
    attention = recipe.attention
    asked = attention if isinstance(attention, Mapping) else {"*": attention}
    text = (
        str(tile),
        *(f"{key} {_basis(spec)!r}" for key, spec in asked.items()),
        *(each.name for each in prepare),
    )
    return digest(model, text)


def _basis(spec: AttentionPattern | None) -> object:
    """The part of a spec that statistics depend on: goals are met afterwards."""
    if isinstance(spec, SkipSoftmax):
        return ("skip", spec.tile, spec.order, spec.factors)
    return replace(spec, deviations=0.0) if isinstance(spec, Theta) else None
