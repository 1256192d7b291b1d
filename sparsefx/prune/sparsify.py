"""prune_weights(): decide the masks that a recipe asks for and zero the pruned weights.

    pattern, criterion = recipe(name);  keep = pattern(criterion(W));  W[~keep] = 0

Everything that can fail comes before the first write.
"""

import copy
import fnmatch
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sparsefx.annotations import annotate
from sparsefx.errors import (
    NonFiniteWeight,
    NothingMatches,
    PatternDoesNotFit,
)
from sparsefx.formats import pack_bits, unpack_bits
from sparsefx.prune.weights import PrunableWeight, prunable_weights
from sparsefx.spec import Pattern, Recipe

M = TypeVar("M", bound=nn.Module)


def prune_weights(model: M, recipe: Recipe, *, inplace: bool = False, progress: bool = True) -> M:
    """The weights part of `sparsefx.sparsify`.

    Memory beyond the copy: one weight and one bit for each pruned element. Raises NothingMatches,
    PatternDoesNotFit, NonFiniteWeight; `model` is unchanged after any of them.
    """
    weights = prunable_weights(model)
    chosen = choose_patterns(weights, recipe, type(model).__name__)
    for name, pattern in chosen.items():
        _check(weights[name], pattern)
    keeps = _decide(weights, chosen, progress)
    pruned = model if inplace else copy.deepcopy(model)
    _write(prunable_weights(pruned), keeps)
    annotate(pruned, {alias: chosen[name] for name in chosen for alias in weights[name].names})
    return pruned


def choose_patterns(
    weights: Mapping[str, PrunableWeight], recipe: Recipe, model: str
) -> dict[str, Pattern]:
    """The pattern of each weight that `recipe` prunes, by name; `model` is named in errors.

    Raises NothingMatches for a key that selects no weight.
    """
    for key, pattern in recipe.weights.items():
        # A key that maps to None is satisfied by a weight that is dense anyway.
        if not any(_selects(key, weight, pattern is None) for weight in weights.values()):
            raise NothingMatches(key=key, model=model, examples=_examples(weights))
    patterns = {name: _pattern_of(weight, recipe) for name, weight in weights.items()}
    return {name: pattern for name, pattern in patterns.items() if pattern is not None}


def _selects(key: str, weight: PrunableWeight, also_held_back: bool = False) -> bool:
    if weight.held_back and not also_held_back:
        return key in weight.names
    return any(fnmatch.fnmatchcase(name, key) for name in weight.names)


def _pattern_of(weight: PrunableWeight, recipe: Recipe) -> Pattern | None:
    for key, pattern in recipe.weights.items():
        if _selects(key, weight):
            return pattern
    return None


def _examples(weights: Mapping[str, PrunableWeight]) -> str:
    shown = [
        f"{name} ({weight.held_back}: only its exact name selects it)"
        for name, weight in weights.items()
        if weight.held_back
    ][:1]
    shown += [name for name, weight in weights.items() if not weight.held_back][:3]
    return ", ".join(shown) or "none, there is no nn.Linear, Conv1D or nn.Conv2d"


def _check(weight: PrunableWeight, pattern: Pattern) -> None:
    rule = pattern.misfit(weight.fit_shape)
    if rule is not None:
        shape = tuple(weight.parameter.shape)
        raise PatternDoesNotFit(pattern=pattern, name=weight.name, shape=shape, rule=rule)
    strange = weight.parameter.numel() - int(weight.parameter.detach().isfinite().sum())
    if strange:
        raise NonFiniteWeight(name=weight.name, count=strange)


def _decide(
    weights: Mapping[str, PrunableWeight], chosen: Mapping[str, Pattern], progress: bool
) -> dict[str, Tensor]:
    """Packed keep bits of each chosen weight's matrix: all are known before one is written."""
    keeps = {}
    bar = tqdm(chosen.items(), desc="sparsify", unit="weight", disable=not progress)
    for name, pattern in bar:
        keep = pattern.keep(pattern.criterion.scores(weights[name].matrix()))
        keeps[name] = pack_bits(keep)
    return keeps


def _write(weights: Mapping[str, PrunableWeight], keeps: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, bits in keeps.items():
            weight = weights[name]
            keep = unpack_bits(bits, weight.parameter.numel() // bits.shape[0])
            weight.parameter.masked_fill_(~weight.as_stored(keep), 0)
