"""What one compilation of a model has done so far: its graphs, their rows, its seconds.

A model may be captured as several graphs (prefill, decode, another length), each when it is first
called; a session collects them and explain() reads it.
"""

import fnmatch
import itertools
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from sparsefx.report import Report, Row
from sparsefx.tuned import Tuned
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
    thing belong together. seen: the weights that its graphs read, as keys, and `names`,
    by name. globs: the keys of a recipe that the backend was given. tuned: verdicts at hand.
    """

    title: str
    target: str
    guard: str
    asked: str = ""
    graphs: list[GraphRecord] = field(default_factory=list)
    seen: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    names: set[str] = field(default_factory=set)
    globs: tuple[str, ...] = ()
    tuned: Tuned | None = None
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
        idle = [key for key in self.globs if not fnmatch.filter(self.names, key)]
        for graph in self.graphs:
            for name, seconds in graph.seconds.items():
                totals[name] = totals.get(name, 0.0) + seconds
        return {
            "target": self.target,
            "guard": self.guard,
            "graphs": str(len(self.graphs)),
            **({} if self.tuned is None else {"tuning results": str(self.tuned)}),
            "torch": str(torch.__version__),
            **({"recipe keys that matched nothing": ", ".join(idle)} if idle else {}),
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
        session.seen[weight] = _BY_WEIGHT[weight] = session


def continued(inputs: Iterable[object], asked: str) -> Session | None:
    """The session, still in use, that compiled another graph of the same weights as `asked`."""
    for value in inputs:
        session = _BY_WEIGHT.get(value) if isinstance(value, nn.Parameter) else None
        if isinstance(session, Session) and session.asked == asked and session.living_weights():
            return session
    return None


def recall(model: nn.Module) -> Session | None:
    """The session that compiled a model or, last, its weights: several, joined, if they differ."""
    if model in _BY_MODEL:
        return _BY_MODEL[model]
    weights = itertools.chain(model.parameters(), model.buffers())
    found = {id(session): session for session in map(_BY_WEIGHT.get, weights) if session}
    return _joined(list(found.values()))


def _joined(sessions: Sequence[Session]) -> Session | None:
    """One record of all. Graphs that share no weight, as on two sides of a graph break, come to a
    backend as if they were of two models."""
    if len(sessions) < 2:
        return sessions[0] if sessions else None
    first = sessions[0]
    whole = Session(
        first.title, first.target, first.guard, first.asked, globs=first.globs, tuned=first.tuned
    )
    for number, graph in enumerate(graph for session in sessions for graph in session.graphs):
        rows = tuple(replace(row, graph=number) for row in graph.rows)
        whole.graphs.append(replace(graph, rows=rows))
    for session in sessions:
        whole.seen.update(session.seen)
        whole.names |= session.names
    return whole
