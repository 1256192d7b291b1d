"""dense -> dense:  linear(x, w, b)  =>  linear(x, w', b)   where w' = w pruned by the recipe

For `torch.compile(model, backend="sparsefx", options={"recipe": ...})`, which must leave the user's
weights alone: w' is a copy. `sparsefx.compile` prunes a copy of the model beforehand instead.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sparsefx.attributes import count_nonfinite
from sparsefx.candidates import Candidate, candidates, parameter_name, stored_weight
from sparsefx.errors import NonFiniteWeight, PatternDoesNotFit
from sparsefx.pipeline import PassContext
from sparsefx.prune.solve import solve
from sparsefx.rewrite import Site
from sparsefx.spec import Pattern, Recipe


@dataclass(frozen=True)
class ApplyRecipe:
    """Prunes the constant weights of linears by the recipe's patterns and criteria."""

    recipe: Recipe
    name: str = "apply_recipe"
    stage: str = "dense"

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> int:
        """Returns how many linears got a pruned weight."""
        embedded = _embedded(gm)
        count = 0
        for candidate in candidates(gm):
            pattern = self._pattern(candidate, embedded)
            if pattern is not None:
                _prune(gm, candidate, pattern, ctx, self.name)
                count += 1
        return count

    def _pattern(self, candidate: Candidate, embedded: frozenset[int]) -> Pattern | None:
        if candidate.weight is None:
            return None
        name = parameter_name(candidate.weight)
        tied = id(candidate.weight.meta["val"]) in embedded
        # A bare glob must not prune a head by way of its embedding; naming it is a decision.
        return None if tied and name not in self.recipe.weights else self.recipe.pattern_for(name)


def _embedded(gm: fx.GraphModule) -> frozenset[int]:
    """Identities of the weights that an embedding reads."""
    tables = (torch.nn.functional.embedding, torch.embedding, torch.ops.aten.embedding.default)
    readers = [node for node in gm.graph.nodes if node.target in tables]
    return frozenset(
        id(source.meta["val"])
        for reader in readers
        for source in reader.all_input_nodes
        if source.op == "get_attr"
    )


def _prune(
    gm: fx.GraphModule, candidate: Candidate, pattern: Pattern, ctx: PassContext, author: str
) -> None:
    weight = candidate.weight
    assert weight is not None
    name = parameter_name(weight)
    pruned = ctx.weights.pruned(
        weight.meta["val"], candidate.transposed, repr(pattern), lambda: _kept(candidate, pattern)
    )
    attribute = Site(gm, candidate.node, author).constant(f"{name}_pruned", pruned)
    attribute.meta["sparsefx_parameter"] = name
    attribute.meta["sparsefx_pattern"] = pattern
    candidate.node.replace_input_with(weight, attribute)
    ctx.baked.add(str(weight.target))


def _kept(candidate: Candidate, pattern: Pattern) -> Tensor:
    weight = stored_weight(candidate)
    assert candidate.weight is not None
    name = parameter_name(candidate.weight)
    misfit = pattern.misfit(weight.shape)
    if misfit:
        shape = tuple(weight.shape)
        raise PatternDoesNotFit(pattern=pattern, name=name, shape=shape, rule=misfit)
    if bad := count_nonfinite(weight):
        raise NonFiniteWeight(name=name, count=bad)
    solved = solve(weight, pattern, {})
    kept = torch.where(solved.keep, solved.weight.to(weight.dtype) if pattern.values else weight, 0)
    return kept.t() if candidate.transposed else kept
