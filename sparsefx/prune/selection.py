"""Which weights a recipe prunes, and to which pattern."""

import fnmatch
from collections.abc import Mapping

from sparsefx.errors import NonFiniteWeight, NothingMatches, PatternDoesNotFit
from sparsefx.prune.weights import PrunableWeight
from sparsefx.spec import Pattern, Recipe


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


def check_pattern(weight: PrunableWeight, pattern: Pattern) -> None:
    """Raises PatternDoesNotFit, and NonFiniteWeight for NaN or infinity among the weights."""
    rule = pattern.misfit(weight.fit_shape)
    if rule is not None:
        shape = tuple(weight.parameter.shape)
        raise PatternDoesNotFit(pattern=pattern, name=weight.name, shape=shape, rule=rule)
    strange = weight.parameter.numel() - int(weight.parameter.detach().isfinite().sum())
    if strange:
        raise NonFiniteWeight(name=weight.name, count=strange)
