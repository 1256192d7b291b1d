"""Statistics of the asked layers of one block, gathered while batches run through it.

Layers that always read the same rows (q, k and v of an attention) share their statistics. A weight
of several parts, such as experts, has statistics for each.
"""

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from sparsefx.calibrate.inputs import Sources, Use
from sparsefx.calibrate.rows import Rows, Tokens
from sparsefx.calibrate.statistics import STATISTICS, Statistic
from sparsefx.errors import NonFiniteActivation
from sparsefx.prune.weights import PrunableWeight

Group = tuple[dict[str, Statistic], ...]
"""Of each part, by name."""


class Observers:
    """The statistics that `needs` asks of `weights`, the layers of one block.

    uses: where each graph, of one input signature each, uses these layers.
    """

    def __init__(
        self,
        weights: Mapping[str, PrunableWeight],
        needs: Mapping[str, frozenset[str]],
        uses: Sequence[Sequence[Use]],
    ) -> None:
        shared: dict[object, list[str]] = {}
        for name in weights:
            shared.setdefault((weights[name].parts, _reads(name, uses)), []).append(name)
        self._needs = needs
        self._of: dict[str, Group] = {}
        for names in shared.values():
            asked = sorted(frozenset().union(*(needs[name] for name in names)))
            self._of |= dict.fromkeys(names, _zeros(weights[names[0]], asked))
        self._watched: dict[Sources, dict[Rows, list[str]]] = {}
        for use in (use for graph in uses for use in graph):
            readers = self._watched.setdefault(use.sources, {}).setdefault(use.rows, [])
            if not any(self._of[other] is self._of[use.parameter] for other in readers):
                readers.append(use.parameter)

    def show(self, sources: Sources, values: Sequence[Tensor], tokens: Tokens, batch: int) -> None:
        """Adds the values of some nodes to the statistics of the layers that read them.

        Raises NonFiniteActivation, which names the first of them.
        """
        for rows, readers in self._watched[sources].items():
            for part, own, samples in rows(tokens, *values):
                if not _is_finite(own):
                    raise NonFiniteActivation(name=readers[0], batch=batch)
                for name in readers:
                    for statistic in self._of[name][part].values():
                        statistic.add(own, samples)

    def tensors(self) -> Iterator[Tensor]:
        """Every sum, once, in an order that is the same in all processes."""
        groups = {id(group): group for group in self._of.values()}
        for statistics in (part for group in groups.values() for part in group):
            for statistic in statistics.values():
                yield from statistic.tensors.values()

    def of(self, name: str) -> tuple[Mapping[str, Statistic], ...]:
        """What was asked of one layer, of each part."""
        asked = sorted(self._needs[name])
        return tuple({kind: part[kind] for kind in asked} for part in self._of[name])


def _zeros(weight: PrunableWeight, asked: Sequence[str]) -> Group:
    device = weight.parameter.device
    return tuple(
        {kind: STATISTICS[kind](weight.columns, device) for kind in asked}
        for _ in range(weight.parts)
    )


def _reads(name: str, uses: Sequence[Sequence[Use]]) -> tuple[frozenset[object], ...]:
    """Which rows of which values a layer reads, in each graph."""
    return tuple(
        frozenset((use.sources, use.rows) for use in graph if use.parameter == name)
        for graph in uses
    )


def _is_finite(x: Tensor) -> bool:
    # The sum is NaN or infinite if any value is; it may also overflow.
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())
