"""What becomes of one weight, and of the weights of a block: solve, measure, record."""

import time
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from torch import Tensor

from sparsefx.calibrate.sequential import Block, Visited
from sparsefx.calibrate.statistics import Gram, Sketch, Statistic
from sparsefx.criteria import Random
from sparsefx.errors import NonFiniteStatistics, SingularHessian
from sparsefx.prune.allocation.costs import cost
from sparsefx.prune.layer_of import layer_of
from sparsefx.prune.report.layers import PrunedLayer, heat_of
from sparsefx.prune.solve import Solved, output_error, solve
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
            solved, record = record_of(layer.weight, pattern, layer.statistics, block.name)
            weights[name] = _as_parameter(layer.weight, pattern, solved)
            facts[name] = asdict(record)
        return Visited(weights, facts)


def _own(pattern: Pattern, name: str) -> Pattern:
    """The same, but that random masks of two weights differ."""
    if not isinstance(pattern.criterion, Random):
        return pattern
    seed = pattern.criterion.seed ^ zlib.crc32(name.encode())
    return replace(pattern, criterion=Random(seed))


def _as_parameter(weight: PrunableWeight, pattern: Pattern, solved: Solved) -> Tensor:
    """In the parameter's own shape and dtype; bit for bit where the criterion changes nothing."""
    if pattern.criterion.updates:
        return weight.as_stored(solved.weight).to(weight.parameter.dtype)
    return weight.parameter.detach().masked_fill(~weight.as_stored(solved.keep), 0)


def record_from(facts: Mapping[str, object]) -> PrunedLayer:
    """The record that `asdict` took apart, its tuples come back from JSON as lists."""
    shape, heat = facts["shape"], facts["heat"]
    assert isinstance(shape, list | tuple) and isinstance(heat, list | tuple)
    whole = {**facts, "shape": tuple(shape), "heat": tuple(tuple(row) for row in heat)}
    return PrunedLayer(**whole)  # type: ignore[arg-type]  # our own state, under our own digest


def tried(
    weight: PrunableWeight, pattern: Pattern, statistics: Mapping[str, Statistic]
) -> tuple[Solved, float | None]:
    """The weight under a pattern that fits, and ||(W - W')X|| / ||W X||, None without inputs.

    Raises what `solve` does, naming the layer.
    """
    dense = weight.matrix()
    try:
        solved = solve(dense, _own(pattern, weight.name), statistics)
    except (SingularHessian, NonFiniteStatistics) as bad:
        bad.add_note(f"the layer is {weight.name}")
        raise
    inputs = statistics.get("gram", statistics.get("sketch"))
    if not isinstance(inputs, Gram | Sketch):
        return solved, None
    return solved, output_error(dense, solved.weight, inputs)


def record_of(
    weight: PrunableWeight, pattern: Pattern, statistics: Mapping[str, Statistic], block: str
) -> tuple[Solved, PrunedLayer]:
    """The pruned weight and its line of the report. Raises what `solve` does, naming the layer."""
    started = time.perf_counter()
    solved, error = tried(weight, pattern, statistics)
    layer = layer_of(weight, block)
    return solved, PrunedLayer(
        name=weight.name,
        block=block,
        shape=(solved.keep.shape[0], solved.keep.shape[1]),
        pattern=str(pattern),
        criterion=type(pattern.criterion).__name__,
        asked=pattern.sparsity,
        reached=1 - float(solved.keep.float().mean()),
        error=error,
        seconds=time.perf_counter() - started,
        dense_bytes=cost(None, layer, "bytes"),
        stored_bytes=cost(pattern, layer, "bytes"),
        dense_us=None,
        sparse_us=None,
        heat=heat_of(solved.keep),
    )
