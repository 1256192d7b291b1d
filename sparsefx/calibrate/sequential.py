"""The sequential driver: block by block, each on the outputs of the blocks before it.

    for each block:  statistics of its layers' inputs <- all batches
                     new weights <- visit(block)
                     its outputs, with the new weights <- all batches

Nothing is written to the model: the blocks run out of captured graphs (one for each signature of
the inputs), in which new weights stand for the model's, and new weights go to files.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sparsefx.calibrate import together
from sparsefx.calibrate.inputs import Sources
from sparsefx.calibrate.observers import Observers
from sparsefx.calibrate.plan import Batch, Plan, Reader
from sparsefx.calibrate.program import Stage
from sparsefx.calibrate.resume import Store
from sparsefx.calibrate.spill import Shelf
from sparsefx.calibrate.statistics import Statistic
from sparsefx.entry import inferring
from sparsefx.errors import ShapeMismatch, UnknownOption
from sparsefx.prune.weights import PrunableWeight, prunable_weights


@dataclass(frozen=True)
class Observed:
    """A layer of a block.

    weight: the model's own, as it was before; statistics: of the input of each of its parts, by
    name.
    """

    weight: PrunableWeight
    statistics: Sequence[Mapping[str, Statistic]]

    def parts(self) -> Iterator[tuple[Tensor, Mapping[str, Statistic]]]:
        """The matrix [out, in] of each part, and the statistics of its input."""
        return zip(self.weight.matrices(), self.statistics, strict=True)


@dataclass(frozen=True)
class Block:
    """One block at work, number `number` (from 0) of `count`. layers: by parameter name."""

    name: str
    number: int
    count: int
    layers: Mapping[str, Observed]


@dataclass(frozen=True)
class Visited:
    """What was decided about a block.

    weights: new values by parameter name, in the parameter's own shape and dtype; weights that are
    left out stay as they are. facts: anything JSON can say; kept in the state.
    """

    weights: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, object] = field(default_factory=dict)


Visit = Callable[[Block], Visited]


class Results:
    """What was decided about all blocks; a context manager that removes its temporary files."""

    def __init__(self, store: Store, files: ExitStack) -> None:
        self._store, self._files = store, files

    @property
    def facts(self) -> list[Mapping[str, object]]:
        """The facts of each block, in order."""
        return [record.facts for record in self._store.records]

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(parameter name, new value on the CPU) of each changed weight, read one at a time."""
        return self._store.weights()

    def close(self) -> None:
        """Removes the temporary files; a `state` folder stays."""
        self._files.close()

    def __enter__(self) -> "Results":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def run_blocks(
    model: nn.Module,
    batches: Iterable[object],
    needs: Mapping[str, frozenset[str]],
    visit: Visit,
    *,
    max_memory: int | None = None,
    state: Path | None = None,
    digest: str = "",
    progress: bool = True,
    label: str = "prune",
) -> Results:
    """Visits the blocks of `model` in the order in which they run; see the module.

    model: run in eval mode and without gradients; not changed. batches: a Tensor, a tuple or list
    of positional, or a mapping of keyword arguments each, on the model's device; read once.
    Where they have an `attention_mask` [batch, length], tokens at 0 do not count; those of a
    decoder behind an encoder have its `decoder_attention_mask`. needs: which
    STATISTICS each weight's input is to have, by the names of `prunable_weights`; weights with
    none are visited too. visit: gets each block that has such weights. max_memory: bytes of
    activations that stay in memory between blocks; the others lie in temporary files. state: a
    folder that keeps what was decided about each block; a run with the same `digest` (of all that
    decides about the weights but the batches), weights' names and batches goes on from there, to
    the same weights bit for bit. In distributed runs each process brings batches of its own and the
    same `digest`, the statistics are of all batches, and the first process's decisions hold and are
    kept in `state`.

    Raises EmptyCalibration, NotCapturable, UnobservedLayer (statistics were asked of a layer that
    no batch runs), NonFiniteActivation, ForeignCalibration, ShapeMismatch (of a new weight),
    PeerFailed, OSError (a disk that is full), and whatever `visit` raises.
    """
    weights = prunable_weights(model)
    asked = {name: weights[name] for name in needs}
    with ExitStack() as kept:
        with (
            tempfile.TemporaryDirectory(prefix="sparsefx-") as spilled,
            inferring(model),
            torch.no_grad(),
        ):
            shelf = Shelf(max_memory, Path(spilled))
            with together.all_or_none("reading its batches"):
                plan = Reader(model, asked, needs).read(batches, shelf)
            layers = [[name, sorted(needs[name])] for each in plan.layers for name in each]
            decides = {"model, patterns or options": digest}
            together.check_equal({"blocks": plan.names, "layers": layers} | decides)
            with together.all_or_none("opening its state"):
                whole = json.dumps([digest, plan.digest, plan.names, layers])
                if state is None or not together.is_first():
                    state = Path(kept.enter_context(tempfile.TemporaryDirectory()))
                store = Store(state, hashlib.sha256(whole.encode()).hexdigest())
            _Run(plan, asked, needs, store, shelf).all_blocks(visit, progress, label)
        return Results(store, kept.pop_all())


class _Run:
    """One run over all segments of a plan."""

    def __init__(
        self,
        plan: Plan,
        weights: Mapping[str, PrunableWeight],
        needs: Mapping[str, frozenset[str]],
        store: Store,
        shelf: Shelf,
    ) -> None:
        self._plan, self._weights, self._needs = plan, weights, needs
        self._store, self._shelf = store, shelf
        self._aliases = {alias: name for name, each in weights.items() for alias in each.names}

    def all_blocks(self, visit: Visit, progress: bool, label: str) -> None:
        """Visits every segment that has layers and is not in the store, and runs them all."""
        done = together.share_json(len(self._store.records))
        blocks = [number for number, layers in enumerate(self._plan.layers) if layers]
        keeps = True  # whether a block's outputs are likely to hold: if the one before was left
        bar = tqdm(total=len(blocks), initial=done, desc=label, unit="block", disable=not progress)
        with bar:
            for segment, layers in enumerate(self._plan.layers):
                outputs = None
                if layers and blocks.index(segment) < done:
                    self._replay(blocks.index(segment), segment)
                elif layers:
                    number = blocks.index(segment)
                    outputs = self._visit(segment, number, len(blocks), visit, keeps)
                    keeps = not self._store.records[-1].names
                    bar.update()
                with together.all_or_none(f"running {self._plan.names[segment]}"):
                    self._go_on(segment, outputs)

    def _visit(
        self, segment: int, number: int, count: int, visit: Visit, keeps: bool
    ) -> list[int] | None:
        """Statistics, decision, record. The tickets of the block's outputs if they still hold."""
        name, layers = self._plan.names[segment], self._plan.layers[segment]
        weights = {layer: self._weights[layer] for layer in layers}
        uses = [program.uses[segment] for program in self._plan.programs]
        with together.all_or_none(f"running {name}"):
            observers = Observers(weights, self._needs, uses)
            outputs = self._run(segment, observers, advances=keeps)
        together.add_up(observers.tensors())
        with together.all_or_none(f"deciding about {name}"):
            observed = {layer: Observed(weights[layer], observers.of(layer)) for layer in layers}
            visited = visit(Block(name, number, count, observed))
            self._check(visited, layers)
        visited = self._shared(visited)
        with together.all_or_none(f"writing {name}"):
            self._store.add(name, visited.weights, visited.facts)
        if visited.weights and outputs is not None:
            self._drop(outputs)
        return None if visited.weights else outputs

    def _run(
        self, segment: int, observers: Observers | None, *, advances: bool
    ) -> list[int] | None:
        """Every batch through one segment; the tickets of what lives after it, if it advances."""
        stages = [
            Stage(each, segment, self._new, shows=observers is not None, advances=advances)
            for each in self._plan.programs
        ]
        outputs = []
        for number, batch in enumerate(self._plan.batches):
            values = self._shelf.get(batch.ticket)
            if observers is None:  # nobody needs the inputs again
                self._shelf.drop(batch.ticket)

            def show(
                sources: Sources,
                shown: Sequence[Tensor],
                number: int = number,
                batch: Batch = batch,
            ) -> None:
                assert observers is not None
                observers.show(sources, shown, batch.tokens, number)

            result = stages[batch.program].run(values, show)
            del values
            if advances:
                outputs.append(self._shelf.put(result))
        return outputs if advances else None

    def _go_on(self, segment: int, outputs: list[int] | None) -> None:
        """Replaces every batch's values by those that live after `segment`."""
        after = segment + 1
        if not any(each.live[after] or each.constants[after] for each in self._plan.programs):
            return
        if outputs is None:
            outputs = self._run(segment, None, advances=True)
        else:
            self._drop([batch.ticket for batch in self._plan.batches])
        assert outputs is not None
        for batch, ticket in zip(self._plan.batches, outputs, strict=True):
            batch.ticket = ticket

    def _drop(self, tickets: list[int]) -> None:
        for ticket in tickets:
            self._shelf.drop(ticket)

    def _new(self, name: str) -> Tensor | None:
        """What a block decided about a weight, as the graphs of this run take it."""
        if name not in self._aliases:
            return None
        weight = self._weights[self._aliases[name]]
        new = self._store.weight(weight.name)
        return None if new is None else new.to(weight.parameter.device)

    def _check(self, visited: Visited, layers: list[str]) -> None:
        for name, weight in visited.weights.items():
            if name not in layers:
                raise UnknownOption(option="a weight of the block", value=name, known=layers)
            like = self._weights[name].parameter
            if weight.shape != like.shape or weight.dtype != like.dtype:
                rule = f"the parameter has {tuple(like.shape)}, {like.dtype}"
                shape = f"{tuple(weight.shape)}, {weight.dtype}"
                remedy = "Return weights in the parameter's own shape and dtype"
                raise ShapeMismatch(name=f"new {name}", shape=shape, rule=rule, remedy=remedy)

    def _shared(self, visited: Visited) -> Visited:
        """The first process's decision; its facts as they come back from a file."""
        names = together.share_json(list(visited.weights))
        facts = together.share_json(json.loads(json.dumps(dict(visited.facts))))
        weights = {
            name: visited.weights[name]
            if together.is_first()
            else torch.empty_like(self._weights[name].parameter)
            for name in names
        }
        together.share_tensors(weights.values())
        return Visited(weights, facts)

    def _replay(self, number: int, segment: int) -> None:
        """Hands a block that is done to the processes that do not have the state folder."""
        if not together.several():
            return
        name, visited = self._plan.names[segment], Visited()
        with together.all_or_none(f"reading {name}"):
            if together.is_first():
                record = self._store.records[number]
                found = {each: self._store.weight(each) for each in record.names}
                visited = Visited({k: v for k, v in found.items() if v is not None}, record.facts)
        visited = self._shared(visited)
        with together.all_or_none(f"writing {name}"):
            if not together.is_first():
                self._store.add(name, visited.weights, visited.facts)
