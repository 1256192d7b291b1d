"""What one compilation of a model has done so far: its graphs, their rows, its seconds.

A model may be captured as several graphs (prefill, decode, another length), each when it is first
called; a session collects them and explain() reads it.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from sparsefx.report import Report, Row
from sparsefx.weights import WeightMemo


@dataclass(frozen=True)
class GraphRecord:
    """One captured graph: its rows, the seconds and the number of rewrites of each pass."""

    rows: tuple[Row, ...]
    seconds: dict[str, float]
    counts: dict[str, int]


@dataclass(eq=False)
class Session:
    """The record of one compilation. Keeps no tensor alive.

    asked: what the compilation was asked for, as text; graphs of one model that ask for the same
    thing belong together.
    """

    title: str
    target: str
    guard: str
    asked: str = ""
    graphs: list[GraphRecord] = field(default_factory=list)
    _weights: "weakref.ref[WeightMemo] | None" = None

    def weights(self) -> WeightMemo:
        """What its graphs know of the weights; lives as long as any of the compiled graphs."""
        memo = self.living_weights()
        if memo is None:
            memo = WeightMemo()
            self._weights = weakref.ref(memo)
        return memo

    def living_weights(self) -> WeightMemo | None:
        """The same if a compiled graph still holds it."""
        return None if self._weights is None else self._weights()

    def report(self) -> Report:
        """All graphs in the order in which they were captured."""
        rows = [row for graph in self.graphs for row in graph.rows]
        return Report(self.title, rows, self._facts())

    def _facts(self) -> dict[str, str]:
        totals: dict[str, float] = {}
        for graph in self.graphs:
            for name, seconds in graph.seconds.items():
                totals[name] = totals.get(name, 0.0) + seconds
        return {
            "target": self.target,
            "guard": self.guard,
            "graphs": str(len(self.graphs)),
            "torch": str(torch.__version__),
            "seconds in passes": f"{sum(totals.values()):.2f}",
            **{f"seconds in {name}": f"{seconds:.2f}" for name, seconds in totals.items()},
        }


# These two change, and must: torch gives a backend neither the model nor a place to keep a record
# on, and an attribute on the user's model or parameters would be pickled and copied with them. Weak
# keys by identity: an entry goes with its model.
_BY_MODEL: "weakref.WeakKeyDictionary[nn.Module, Session]" = weakref.WeakKeyDictionary()
_BY_WEIGHT = WeakTensorKeyDictionary()


def remember_model(model: nn.Module, session: Session) -> None:
    """Links a model to the session that compiles it."""
    _BY_MODEL[model] = session


def remember_weights(weights: Iterable[Tensor], session: Session) -> None:
    """Links weights to the session whose graph reads them."""
    for weight in weights:
        _BY_WEIGHT[weight] = session


def continued(inputs: Iterable[object], asked: str) -> Session | None:
    """The session, still in use, that compiled another graph of the same weights as `asked`."""
    for value in inputs:
        session = _BY_WEIGHT.get(value) if isinstance(value, nn.Parameter) else None
        if isinstance(session, Session) and session.asked == asked and session.living_weights():
            return session
    return None


def recall(model: nn.Module) -> Session | None:
    """The session that compiled a model or, last, any of its parameters."""
    if model in _BY_MODEL:
        return _BY_MODEL[model]
    for parameter in model.parameters():
        session = _BY_WEIGHT.get(parameter)
        if isinstance(session, Session):
            return session
    return None
