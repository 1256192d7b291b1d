"""What allocations measure block by block: outliers, and errors of patterns."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparsefx.calibrate.sequential import Block, Observed, Visit, Visited, run_blocks
from sparsefx.calibrate.statistics import Gram, SquareSum
from sparsefx.errors import MissingCalibration
from sparsefx.patterns import Pattern
from sparsefx.prune.allocation.owl import outlier_share
from sparsefx.prune.decide import needs_of, tried
from sparsefx.prune.output import row_errors
from sparsefx.prune.solve import Solved
from sparsefx.prune.weights import PrunableWeight

Facts = dict[str, Any]  # Any: what JSON gave back, whose form the visit has decided


@dataclass(frozen=True)
class Data:
    """A model, calibration batches, and how the driver may treat them (as in `run_blocks`).

    cache: where the speed of this machine is kept, as in `devices.named`.
    """

    model: nn.Module
    batches: Iterable[object] | None
    progress: bool = True
    max_memory: int | None = None
    cache: Path | None = None


def outliers_of_blocks(
    data: Data, weights: Mapping[str, PrunableWeight], blocks: Mapping[str, str], outlier: float
) -> dict[str, float]:
    """Block name -> percent of its Wanda scores above `outlier` times their mean.

    blocks: of each weight. Several blocks that the driver runs as one are told apart by it.
    """

    def visit(block: Block) -> Visited:
        groups: dict[str, list[Observed]] = {}
        for name, layer in block.layers.items():
            groups.setdefault(blocks[name], []).append(layer)
        return Visited(facts={name: _outliers(group, outlier) for name, group in groups.items()})

    needs = {name: frozenset({"squares"}) for name in blocks}
    return facts_of_blocks(data, needs, visit, "outliers")


def _outliers(layers: Sequence[Observed], outlier: float) -> float:
    pairs = []
    for matrix, statistics in (part for layer in layers for part in layer.parts()):
        squares = statistics["squares"]
        assert isinstance(squares, SquareSum)
        pairs.append((matrix, squares.norms))
    return outlier_share(pairs, outlier)


def tried_on(layer: Observed, pattern: Pattern) -> tuple[Solved, float]:
    """The layer under a pattern that fits, and ||(W - W')X|| / ||W X|| on its inputs.

    It has a gram among its statistics. Raises what `solve` does, naming the layer.
    """
    solved, error = tried(layer, pattern)
    assert error is not None  # there is a gram
    return solved, error


@dataclass(frozen=True)
class _Errors:
    """A visit that tries every choice on every layer of a dense model; see `error_table`."""

    chosen: Mapping[str, Pattern]
    choices: Mapping[str, Sequence[Pattern | None]]
    importance: Mapping[str, Tensor] | None

    def __call__(self, block: Block) -> Visited:
        return Visited(facts={name: self._of(name, each) for name, each in block.layers.items()})

    def _of(self, name: str, layer: Observed) -> list[float | None]:
        criterion = self.chosen[name].criterion
        return [
            self._error(layer, None if choice is None else replace(choice, criterion=criterion))
            for choice in self.choices[name]
        ]

    def _error(self, layer: Observed, pattern: Pattern | None) -> float | None:
        """None if the pattern does not fit."""
        if pattern is None:
            return 0.0
        if pattern.misfit(layer.weight.fit_shape) is not None:
            return None
        solved, error = tried_on(layer, pattern)
        if self.importance is None:
            return error**2
        pruned = solved.weight.chunk(layer.weight.parts)
        weighted = self.importance[layer.weight.name].chunk(layer.weight.parts)
        total, samples = 0.0, 1
        for (dense, statistics), own, each in zip(layer.parts(), pruned, weighted, strict=True):
            gram = statistics["gram"]
            assert isinstance(gram, Gram)
            total += float(row_errors(dense.float() - own, gram.gram) @ each)
            samples = max(samples, int(gram.count[1]))
        return total / 2 / samples


def error_table(
    data: Data,
    chosen: Mapping[str, Pattern],
    choices: Mapping[str, Sequence[Pattern | None]],
    importance: Mapping[str, Tensor] | None = None,
) -> dict[str, list[float]]:
    """Of each weight, the error of each of its choices on dense inputs.

    That is the squared relative output error; with the importance of each weight's outputs (rows
    of its matrix), half the squared change of each output times its importance, a sample of the
    data on average. Choices are tried under the criterion of the weight's pattern in `chosen`.
    Infinite for a choice that does not fit.
    """
    visit = _Errors(chosen, choices, importance)
    found = facts_of_blocks(data, needs_of(chosen, exact=True), visit, "errors")
    return {
        name: [math.inf if error is None else error for error in errors]
        for name, errors in found.items()
    }


def facts_of_blocks(
    data: Data, needs: Mapping[str, frozenset[str]], visit: Visit, label: str
) -> Facts:
    """The facts of all blocks, whose inputs are dense if no visit returns weights.

    Raises MissingCalibration, and what `run_blocks` does.
    """
    if data.batches is None:
        raise MissingCalibration(what=f"an allocation by {label}")
    with run_blocks(
        data.model,
        data.batches,
        needs,
        visit,
        max_memory=data.max_memory,
        progress=data.progress,
        label=label,
    ) as results:
        return {name: fact for facts in results.facts for name, fact in facts.items()}
