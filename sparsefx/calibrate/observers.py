"""Statistics of the asked layers of one block, gathered while batches run through it.

Layers that always read the same rows (q, k and v of an attention) share their statistics.
"""

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, fx

from sparsefx.calibrate.inputs import Rows, Tokens, Use
from sparsefx.calibrate.statistics import STATISTICS, Statistic
from sparsefx.errors import NonFiniteActivation
from sparsefx.prune.weights import PrunableWeight

Group = dict[str, Statistic]


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
            shared.setdefault(_reads(name, uses), []).append(name)
        self._needs = needs
        self._of: dict[str, Group] = {}
        for names in shared.values():
            asked = sorted(frozenset().union(*(needs[name] for name in names)))
            parameter = weights[names[0]].parameter
            width = parameter.numel() // weights[names[0]].matrix().shape[0]
            group = {kind: STATISTICS[kind](width, parameter.device) for kind in asked}
            self._of |= dict.fromkeys(names, group)
        self._watched: dict[fx.Node, dict[Rows, list[str]]] = {}
        for use in (use for graph in uses for use in graph):
            readers = self._watched.setdefault(use.source, {}).setdefault(use.rows, [])
            if not any(self._of[other] is self._of[use.parameter] for other in readers):
                readers.append(use.parameter)

    def show(self, node: fx.Node, x: Tensor, tokens: Tokens, batch: int) -> None:
        """Adds the value of a node to the statistics of the layers that read it.

        Raises NonFiniteActivation, which names the first of them.
        """
        for rows, readers in self._watched[node].items():
            for part, samples in rows(x, tokens):
                if not _is_finite(part):
                    raise NonFiniteActivation(name=readers[0], batch=batch)
                for name in readers:
                    for statistic in self._of[name].values():
                        statistic.add(part, samples)

    def tensors(self) -> Iterator[Tensor]:
        """Every sum, once, in an order that is the same in all processes."""
        groups = {id(group): group for group in self._of.values()}
        for group in groups.values():
            for statistic in group.values():
                yield from statistic.tensors.values()

    def of(self, name: str) -> Mapping[str, Statistic]:
        """What was asked of one layer."""
        return {kind: self._of[name][kind] for kind in sorted(self._needs[name])}


def _reads(name: str, uses: Sequence[Sequence[Use]]) -> tuple[frozenset[object], ...]:
    """Which rows of which values a layer reads, in each graph."""
    return tuple(
        frozenset((use.source, use.rows) for use in graph if use.parameter == name)
        for graph in uses
    )


def _is_finite(x: Tensor) -> bool:
    # The sum is NaN or infinite if any value is; it may also overflow.
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())
