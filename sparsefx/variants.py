"""A compiled graph that notices when its weights are no longer those it was packed from.

Dynamo passes weights as inputs on each call and does not guard on their values, and it may run one
graph for two modules of the same class. A packed graph holds for one set of weights only, so each
call compares the weights it is given, by object and version counter, with those that were packed;
others get a variant of their own.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from sparsefx.weights import Version, version

Compiled = Callable[..., object]


@dataclass(frozen=True)
class Variant:
    """A compiled graph and the weights it holds for: (input position, tensor, version)."""

    function: Compiled
    bound: tuple[tuple[int, Tensor, Version], ...]

    def holds(self, args: Sequence[object]) -> bool:
        """Whether `args` bring the same weights, unchanged."""
        for position, weight, packed_version in self.bound:
            if args[position] is not weight or version(weight) != packed_version:
                return False
        return True


class Variants:
    """One Dynamo graph, compiled once for each set of weights that it is called with.

    `specialise(args)` compiles the graph for the weights in `args` (real tensors where weights are,
    at the positions of the graph's inputs).
    """

    def __init__(self, first: Variant, specialise: Callable[[Sequence[object]], Variant]) -> None:
        self._current = first
        self._all = [first]
        self._specialise = specialise
        self._lock = threading.Lock()

    def __call__(self, *args: object) -> object:
        """Runs the variant that fits; compiles one if there is none."""
        variant = self._current
        if not variant.holds(args):
            variant = self._switch(args)
        return variant.function(*args)

    def _switch(self, args: Sequence[object]) -> Variant:
        with self._lock:
            fitting = [variant for variant in self._all if variant.holds(args)]
            if not fitting:
                fitting = [self._specialise(args)]
                self._all = [v for v in self._all if not _is_outdated(v)] + fitting
            self._current = fitting[0]
            return self._current


def _is_outdated(variant: Variant) -> bool:
    """Whether a weight changed in place since: the variant can never hold again."""
    return any(version(weight) != packed for _, weight, packed in variant.bound)
