"""What becomes of one weight, and of the weights of a block: solve, measure, record."""

import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from sparsefx.calibrate.sequential import Block, Observed, Visited
from sparsefx.calibrate.statistics import Gram, Sketch, SquareSum, Statistic
from sparsefx.criteria import Magnitude, Random
from sparsefx.errors import NonFiniteStatistics, SingularHessian, UnseenLayer
from sparsefx.prune.allocation.costs import cost
from sparsefx.prune.layer_of import blocks_of, layer_of
from sparsefx.prune.output import energies, relative
from sparsefx.prune.report.layers import PrunedLayer, heat_of
from sparsefx.prune.solve import Solved, solve
from sparsefx.prune.weights import PrunableWeight
from sparsefx.spec import Pattern


def statistics_for(pattern: Pattern, *, exact: bool) -> frozenset[str]:
    """What the criterion asks for, and that of which the output error comes.

    exact: the gram; else a sketch will do where the criterion asks for no gram itself.
    """
    needs = pattern.criterion.needs
    return needs | {"gram"} if exact or "gram" in needs else needs | {"sketch"}


def needs_of(chosen: Mapping[str, Pattern], *, exact: bool) -> dict[str, frozenset[str]]:
    """`statistics_for` the pattern of each weight by name, as `run_blocks` takes it."""
    return {name: statistics_for(pattern, exact=exact) for name, pattern in chosen.items()}


@dataclass(frozen=True)
class Decision:
    """A visit of the sequential driver that prunes each layer to its pattern, by name."""

    patterns: Mapping[str, Pattern]

    def __call__(self, block: Block) -> Visited:
        """New weights, and the record of each as facts."""
        weights: dict[str, Tensor] = {}
        facts: dict[str, object] = {}
        for name, layer in block.layers.items():
            pattern = self.patterns[name]
            solved, record = record_of(layer, pattern, block.name)
            weights[name] = _as_parameter(layer.weight, pattern, solved)
            facts[name] = asdict(record)
        return Visited(weights, facts)


def _as_parameter(weight: PrunableWeight, pattern: Pattern, solved: Solved) -> Tensor:
    """In the parameter's own shape and dtype; bit for bit where nothing but zeros is new."""
    if pattern.values or pattern.criterion.updates:
        return weight.as_stored(solved.weight).to(weight.parameter.dtype)
    return weight.parameter.detach().masked_fill(~weight.as_stored(solved.keep), 0)


def record_from(facts: Mapping[str, object]) -> PrunedLayer:
    """The record that `asdict` took apart, its tuples come back from JSON as lists."""
    shape, heat = facts["shape"], facts["heat"]
    assert isinstance(shape, list | tuple) and isinstance(heat, list | tuple)
    whole = {**facts, "shape": tuple(shape), "heat": tuple(tuple(row) for row in heat)}
    return PrunedLayer(**whole)  # type: ignore[arg-type]  # our own state, under our own digest


def tried(layer: Observed, pattern: Pattern) -> tuple[Solved, float | None]:
    """The weight under a pattern that fits, and ||(W - W')X|| / ||W X||, None without inputs.

    Parts with inputs of their own are solved one by one, each as a weight of its own. Raises what
    `solve` does, naming the layer.
    """
    unseen = [_is_unseen(each) for each in layer.statistics]
    if pattern.criterion.needs and all(unseen):
        raise UnseenLayer(name=layer.weight.name)
    dense = layer.weight.matrix()
    parts = dense.chunk(layer.weight.parts)
    if pattern.criterion.needs or layer.weight.is_stack:
        solved = _joined([_solved(layer, pattern, *part) for part in enumerate(parts)])
    else:  # data-free, the filters of all groups of a convolution are compared
        solved = solve(dense, _own(pattern, layer.weight.name), {})
    if all(unseen):
        return solved, None
    found = []
    pruned = solved.weight.chunk(len(parts))
    for each, own, statistics in zip(parts, pruned, layer.statistics, strict=True):
        inputs = statistics.get("gram", statistics.get("sketch"))
        if not isinstance(inputs, Gram | Sketch):
            return solved, None
        found.append(energies(each, own, inputs))
    return solved, relative(found)


def _solved(layer: Observed, pattern: Pattern, part: int, dense: Tensor) -> Solved:
    """One part; by magnitude where no input was seen, as of an expert that no token went to."""
    name = layer.weight.name + (f", expert {part}" if layer.weight.is_stack else "")
    if pattern.criterion.needs and _is_unseen(layer.statistics[part]):
        pattern = replace(pattern, criterion=Magnitude())
    try:
        return solve(dense, _own(pattern, name), layer.statistics[part])
    except (SingularHessian, NonFiniteStatistics) as bad:
        raise type(bad)(**bad.fields | {"name": name}) from bad


def _is_unseen(statistics: Mapping[str, Statistic]) -> bool:
    counted = [each for each in statistics.values() if isinstance(each, SquareSum | Gram)]
    sketches = [each for each in statistics.values() if isinstance(each, Sketch)]
    if counted:
        return any(int(each.count[0]) == 0 for each in counted)
    return bool(sketches) and not any(each.sums.any() for each in sketches)


def _own(pattern: Pattern, name: str) -> Pattern:
    """The same, but that random masks of two weights differ."""
    if not isinstance(pattern.criterion, Random):
        return pattern
    seed = pattern.criterion.seed ^ zlib.crc32(name.encode())
    return replace(pattern, criterion=Random(seed))


def _joined(parts: Sequence[Solved]) -> Solved:
    if len(parts) == 1:
        return parts[0]
    return Solved(torch.cat([each.weight for each in parts]), torch.cat([p.keep for p in parts]))


def record_of(layer: Observed, pattern: Pattern, block: str) -> tuple[Solved, PrunedLayer]:
    """The pruned weight and its line of the report. Raises what `solve` does, naming the layer."""
    started = time.perf_counter()
    solved, error = tried(layer, pattern)
    weight = layer.weight
    costed = layer_of(weight, block)
    return solved, PrunedLayer(
        name=weight.name,
        block=block,
        shape=(solved.keep.shape[0], solved.keep.shape[1]),
        pattern=str(pattern),
        criterion=type(pattern.criterion).__name__,
        asked=pattern.sparsity,
        reached=float((solved.weight == 0).float().mean()),
        error=error,
        seconds=time.perf_counter() - started,
        dense_bytes=cost(None, costed, "bytes"),
        stored_bytes=cost(pattern, costed, "bytes"),
        dense_us=None,
        sparse_us=None,
        heat=heat_of(solved.keep),
        note=_note(layer, pattern),
    )


def dense_records(weights: Mapping[str, PrunableWeight]) -> dict[str, PrunedLayer]:
    """The lines of weights that an allocation leaves as they are."""
    blocks = blocks_of(weights)
    return {name: _dense_record(weight, blocks[name]) for name, weight in weights.items()}


def _dense_record(weight: PrunableWeight, block: str) -> PrunedLayer:
    matrix = weight.matrix()
    size = cost(None, layer_of(weight, block), "bytes")
    return PrunedLayer(
        name=weight.name,
        block=block,
        shape=(matrix.shape[0], matrix.shape[1]),
        pattern="dense",
        criterion="-",
        asked=0.0,
        reached=float((matrix == 0).float().mean()),
        error=0.0,
        seconds=0.0,
        dense_bytes=size,
        stored_bytes=size,
        dense_us=None,
        sparse_us=None,
        heat=heat_of(torch.ones_like(matrix, dtype=torch.bool)),
        note="the allocation leaves it dense",
    )


def _note(layer: Observed, pattern: Pattern) -> str:
    unseen = sum(_is_unseen(each) for each in layer.statistics)
    if not unseen:
        return ""
    if not layer.weight.is_stack:
        return "it saw no input, so that its error is not known"
    how = " and went by magnitude" if pattern.criterion.needs else ""
    return f"{unseen} of {layer.weight.parts} experts saw no input{how}"
