"""prune_weights(): decide the masks that a recipe asks for and write the pruned weights.

    pattern = recipe(name), or what its allocation makes of it
    W <- solve(W, pattern, statistics of its input)

Everything that can fail comes before the first write.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sparsefx import debug
from sparsefx.allocations import Within
from sparsefx.annotations import annotate, annotate_pruning, annotations, pruned_layers
from sparsefx.calibrate.digest import digest
from sparsefx.calibrate.sequential import Observed, run_blocks
from sparsefx.calibrate.statistics import Statistic
from sparsefx.formats import pack_bits, unpack_bits
from sparsefx.prune.decide import Decision, dense_records, needs_of, record_from, record_of
from sparsefx.prune.measure import Data
from sparsefx.prune.reorder import reorder
from sparsefx.prune.report.layers import PrunedLayer
from sparsefx.prune.selection import check_pattern, choose_patterns
from sparsefx.prune.spread import spread
from sparsefx.prune.weights import PrunableWeight, prunable_weights
from sparsefx.quantise import rounded
from sparsefx.spec import Pattern, Recipe

M = TypeVar("M", bound=nn.Module)


def prune_weights(
    model: M,
    recipe: Recipe,
    batches: Iterable[object] | None = None,
    *,
    inplace: bool = False,
    progress: bool = True,
    max_memory: int | None = None,
    state: Path | None = None,
) -> M:
    """The weights part of `sparsefx.sparsify`, with its arguments; state: a folder of its own.

    Without data, memory beyond the copy is one weight and one bit for each pruned element; with
    data, new weights lie in files until all are known. Raises NothingMatches, PatternDoesNotFit,
    NonFiniteWeight, and with data what `run_blocks` raises; `model` is unchanged after any of them.
    """
    weights = prunable_weights(model)
    chosen = choose_patterns(weights, recipe, type(model).__name__)
    for name, pattern in chosen.items():
        check_pattern(weights[name], pattern)
    data = Data(model, batches, progress, max_memory, debug.settings().cache)
    stay: dict[str, PrunableWeight] = {}
    if recipe.allocation is not None:

        def build(patterns: Mapping[str, Pattern]) -> nn.Module:
            return prune_to(model, patterns, batches, progress=progress, max_memory=max_memory)

        asked, chosen = chosen, spread(data, weights, chosen, recipe.allocation, build)
        stay = {name: weights[name] for name in asked if name not in chosen}
    target = copy.deepcopy(model) if recipe.permute else model  # what follows may fail
    notes = _reordered(target, data, chosen) if recipe.permute else {}
    pruned = prune_to(
        target,
        chosen,
        batches,
        inplace=inplace or recipe.permute,
        progress=progress,
        max_memory=max_memory,
        state=state,
        exact=isinstance(recipe.allocation, Within) and recipe.allocation.error is not None,
    )
    lines = pruned_layers(pruned)
    noted = {
        name: replace(lines[name], note="; ".join(filter(None, (lines[name].note, note))))
        for name, note in notes.items()
    }
    annotate_pruning(pruned, noted | dense_records(stay))
    if recipe.permute and inplace:
        take_over(model, pruned)
        return model
    return pruned


def _reordered(model: nn.Module, data: Data, chosen: Mapping[str, Pattern]) -> dict[str, str]:
    return reorder(replace(data, model=model), prunable_weights(model), chosen)


def take_over(model: nn.Module, pruned: nn.Module) -> None:
    """Gives `model` the weights, buffers and annotations of its pruned copy."""
    with torch.no_grad():
        for mine, other in (
            *zip(model.parameters(), pruned.parameters(), strict=True),
            *zip(model.buffers(), pruned.buffers(), strict=True),
        ):
            mine.copy_(other)
    annotate(model, annotations(pruned))
    annotate_pruning(model, pruned_layers(pruned))


def prune_to(
    model: M,
    chosen: Mapping[str, Pattern],
    batches: Iterable[object] | None,
    *,
    inplace: bool = False,
    progress: bool = True,
    max_memory: int | None = None,
    state: Path | None = None,
    exact: bool = False,
) -> M:
    """Each weight to its pattern by name, which fits; arguments and errors as `prune_weights`.

    exact: no output error is an estimate.
    """
    weights = prunable_weights(model)
    if any(pattern.criterion.needs for pattern in chosen.values()):
        assert batches is not None  # the caller has asked for them
        return _with_data(model, chosen, batches, inplace, progress, max_memory, state, exact)
    keeps, records = _decide(weights, chosen, progress)
    pruned = model if inplace else copy.deepcopy(model)
    _write(prunable_weights(pruned), keeps, chosen)
    return _annotated(pruned, weights, chosen, records)


def _with_data(
    model: M,
    chosen: Mapping[str, Pattern],
    batches: Iterable[object],
    inplace: bool,
    progress: bool,
    max_memory: int | None,
    state: Path | None,
    exact: bool,
) -> M:
    """Block by block, each on the outputs of the pruned blocks before it."""
    with run_blocks(
        model,
        batches,
        needs_of(chosen, exact=exact),
        Decision(chosen),
        max_memory=max_memory,
        state=state,
        digest=digest(model, (f"{name} {pattern!r}" for name, pattern in chosen.items())),
        progress=progress,
    ) as results:
        pruned = model if inplace else copy.deepcopy(model)
        weights = prunable_weights(pruned)
        with torch.no_grad():
            for name, weight in results.weights():
                weights[name].parameter.copy_(weight)
        facts = {name: each for block in results.facts for name, each in block.items()}
    records = {name: record_from(each) for name, each in facts.items()}  # type: ignore[arg-type]
    return _annotated(pruned, weights, chosen, records)


def _annotated(
    pruned: M,
    weights: Mapping[str, PrunableWeight],
    chosen: Mapping[str, Pattern],
    records: Mapping[str, PrunedLayer],
) -> M:
    annotate(pruned, {alias: chosen[name] for name in chosen for alias in weights[name].names})
    annotate_pruning(pruned, {name: records[name] for name in chosen})
    return pruned


def _decide(
    weights: Mapping[str, PrunableWeight], chosen: Mapping[str, Pattern], progress: bool
) -> tuple[dict[str, Tensor], dict[str, PrunedLayer]]:
    """Packed keep bits of each chosen weight's matrix, all known before one is written."""
    keeps, records = {}, {}
    bar = tqdm(chosen.items(), desc="sparsify", unit="weight", disable=not progress)
    for name, pattern in bar:
        unseen: tuple[dict[str, Statistic], ...] = ({},) * weights[name].parts
        solved, records[name] = record_of(Observed(weights[name], unseen), pattern, "")
        keeps[name] = pack_bits(solved.keep)
    return keeps, records


def _write(
    weights: Mapping[str, PrunableWeight],
    keeps: Mapping[str, Tensor],
    chosen: Mapping[str, Pattern],
) -> None:
    with torch.no_grad():
        for name, bits in keeps.items():
            weight, pattern = weights[name], chosen[name]
            keep = unpack_bits(bits, weight.parameter.numel() // bits.shape[0])
            weight.parameter.masked_fill_(~weight.as_stored(keep), 0)
            if pattern.values:
                codes = rounded(weight.matrix(), pattern.values, pattern.tile(weight.columns))
                weight.parameter.copy_(weight.as_stored(codes))
