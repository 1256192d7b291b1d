"""The graph of one input signature, run segment by segment.

A value is live at the start of a segment if it was computed before and is needed in it or later.
Live values that depend on the batch are handed on from segment to segment, batch by batch; those
that do not (rope tables, causal masks) are the same for every batch and exist once.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.node import map_arg

from sparsefx.attributes import get_tensor, is_graph
from sparsefx.calibrate.inputs import Sources, Use
from sparsefx.calibrate.segments import storages, written
from sparsefx.graph import clone_inputs

Show = Callable[[Sources, Sequence[Tensor]], None]
Replaced = Callable[[str], Tensor | None]
"""The new value of a weight, by any of its names; None where it has none."""


class Program:
    """A captured graph cut at `starts` (graph positions, the first 0).

    observed: the weights whose inputs somebody wants to see; what these do not depend on is never
    run. inputs: the placeholders, one for each leaf of the arguments; uses[k]: the asked layers of
    segment k; shown[k]: the first that reads them -> the values to be shown there; live[k]: the
    values that vary from batch to batch and are live at its start; constants[k]: those that do not
    vary.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        uses: Sequence[Use],
        starts: Sequence[int],
        observed: Collection[str],
    ) -> None:
        self.gm = gm
        nodes = list(gm.graph.nodes)
        order = {node: position for position, node in enumerate(nodes)}
        bounds = [*starts, len(nodes)]
        spans = list(itertools.pairwise(bounds))
        self.inputs = [node for node in nodes if node.op == "placeholder"]
        self.nodes = [nodes[start:end] for start, end in spans]
        self.uses = [
            [use for use in uses if start <= order[use.node] < end] for start, end in spans
        ]
        self.shown = [_first_shown(each, observed) for each in self.uses]
        shown = {use.node: use.sources for use in uses if use.parameter in observed}
        last = _last_positions(nodes, needed(nodes, (), shown), shown)
        varying = _varying(nodes)
        born = order | dict.fromkeys(self.inputs, -1)
        alive = [[node for node in last if born[node] < at <= last[node]] for at in bounds]
        self.live = [[node for node in each if node in varying] for each in alive]
        self.constants = [[node for node in each if node not in varying] for each in alive]
        self.fixed: dict[fx.Node, object] = {}

    def settle(self, leaves: Sequence[object]) -> None:
        """Takes the inputs that are the same in every batch from one of them."""
        given = dict(zip(self.inputs, leaves, strict=True))
        self.fixed = {node: given[node] for node in self.constants[0]}


@dataclass(frozen=True)
class _Step:
    """Computes `calls`, or only shows the values `shows`; then forgets those of `frees`."""

    calls: fx.Node | None
    shows: Sources
    frees: tuple[fx.Node, ...]


class Stage:
    """One segment of a program, to be run on every batch.

    shows: up to the inputs of its asked layers, which `run` shows. advances: also all that is live
    after it. replaced: the weights that are no longer the model's.
    """

    def __init__(
        self, program: Program, segment: int, replaced: Replaced, *, shows: bool, advances: bool
    ) -> None:
        self._program, self._segment, self._advances = program, segment, advances
        following = program.live[segment + 1] + program.constants[segment + 1]
        outputs = following if advances else []
        shown = program.shown[segment] if shows else {}
        wanted = needed(program.nodes[segment], outputs, shown)
        self._steps = list(_steps(program.nodes[segment], wanted, shown, frozenset(outputs)))
        called = [step.calls for step in self._steps if step.calls is not None]
        self._changed = {storage for node in called for storage in written(node)}
        self._weights = {
            source: _attribute(program.gm, source, replaced)
            for node in called
            for source in node.all_input_nodes
            if source.op == "get_attr"
        }

    def run(self, values: Sequence[object], show: Show) -> list[object]:
        """One batch: the values of live[segment] -> those of live[segment + 1] (none: [])."""
        program, after = self._program, self._segment + 1
        env: dict[fx.Node, object] = dict(self._weights)
        env |= {node: program.fixed[node] for node in program.constants[self._segment]}
        env |= zip(program.live[self._segment], values, strict=True)
        for node in env:
            if self._changed.intersection(storages(node)):
                env[node] = clone_inputs(env[node])  # not ours to write to
        for step in self._steps:
            if step.calls is not None:
                env[step.calls] = _call(step.calls, env)
            else:
                show(step.shows, [_tensor(env[node]) for node in step.shows])
            for dead in step.frees:
                del env[dead]
        if not self._advances:
            return []
        for node in program.constants[after]:
            program.fixed.setdefault(node, env[node])
        return [env[node] for node in program.live[after]]


def needed(
    nodes: Sequence[fx.Node], outputs: Iterable[fx.Node], shown: Mapping[fx.Node, Sources]
) -> set[fx.Node]:
    """Of consecutive `nodes` and what they read, what `outputs` and the shown values depend on.

    shown: node -> the values that are shown just before it. A write in place is needed if the
    tensor it writes to is, later on.
    """
    found = set(outputs)
    touched = {storage for node in found for storage in storages(node)}
    for node in reversed(nodes):
        reads: list[fx.Node] = []
        if _is_call(node) and (node in found or touched.intersection(written(node))):
            found.add(node)
            reads += node.all_input_nodes
        reads += shown.get(node, ())
        found.update(reads)
        touched.update(storage for source in reads for storage in storages(source))
    return found


def _steps(
    nodes: Sequence[fx.Node],
    wanted: set[fx.Node],
    shown: Mapping[fx.Node, Sources],
    outputs: frozenset[fx.Node],
) -> Iterator[_Step]:
    """In order; each value is freed behind its last step, but for outputs and weights."""
    plan: list[tuple[fx.Node | None, Sources]] = []
    for node in nodes:
        if node in shown:
            plan.append((None, shown[node]))
        if _is_call(node) and node in wanted:
            plan.append((node, ()))
    kept = set(outputs)
    steps = []
    for calls, shows in reversed(plan):
        reads = shows if calls is None else (calls, *calls.all_input_nodes)
        frees = [each for each in reads if each not in kept and each.op != "get_attr"]
        kept.update(frees)
        steps.append(_Step(calls, shows, tuple(frees)))
    return reversed(steps)


def _first_shown(uses: Sequence[Use], observed: Collection[str]) -> dict[fx.Node, Sources]:
    first: dict[Sources, fx.Node] = {}
    for use in uses:
        if use.parameter in observed:
            first.setdefault(use.sources, use.node)
    return {node: sources for sources, node in first.items()}


def _last_positions(
    nodes: Sequence[fx.Node], wanted: set[fx.Node], shown: Mapping[fx.Node, Sources]
) -> dict[fx.Node, int]:
    """Where each value (not a weight) is read for the last time, in graph order of the values."""
    last: dict[fx.Node, int] = {}
    for position, node in enumerate(nodes):
        reads = list(node.all_input_nodes) if _is_call(node) and node in wanted else []
        reads += shown.get(node, ())
        last |= {source: position for source in reads if source.op != "get_attr"}
    return {node: last[node] for node in nodes if node in last}


def _varying(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """The values that depend on the inputs' tensors, or on chance."""
    found = {
        node
        for node in nodes
        if (node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor))
        or (isinstance(node.target, OpOverload) and _SEEDED in node.target.tags)
    }
    storage: set[int] = set()
    before = -1
    while before != len(found):  # again after a write of something that varies into what did not
        before = len(found)
        for node in nodes:
            inherits = any(source in found for source in node.all_input_nodes)
            if _is_call(node) and (inherits or storage.intersection(storages(node))):
                found.add(node)
                storage.update(written(node))
    return found


_SEEDED = torch.Tag.nondeterministic_seeded


def _is_call(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method")


def _attribute(gm: fx.GraphModule, node: fx.Node, replaced: Replaced) -> object:
    name = str(node.target)
    if is_graph(gm, name):
        return gm.get_submodule(name)
    new = replaced(name)
    return get_tensor(gm, name) if new is None else new


def _tensor(value: object) -> Tensor:
    assert isinstance(value, Tensor)
    return value


def _call(node: fx.Node, env: Mapping[fx.Node, object]) -> object:
    # map_arg is typed for graphs, whose arguments are nodes; here they become values.
    args, kwargs = map_arg((node.args, node.kwargs), env.__getitem__)  # type: ignore[arg-type]
    if callable(node.target):
        return node.target(*args, **kwargs)
    owner, *rest = args
    return getattr(owner, node.target)(*rest, **kwargs)
