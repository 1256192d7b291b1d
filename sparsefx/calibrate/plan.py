"""Calibration batches read once, each distinct input signature captured, and cut into one plan."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from sparsefx.attributes import get_tensor, is_graph
from sparsefx.calibrate.blocks import repeated_blocks
from sparsefx.calibrate.digest import content
from sparsefx.calibrate.given import Given, arguments_of, captured
from sparsefx.calibrate.inputs import Use, layer_uses
from sparsefx.calibrate.program import Program
from sparsefx.calibrate.rows import Tokens
from sparsefx.calibrate.segments import cuts, name_of
from sparsefx.calibrate.spill import Shelf
from sparsefx.calibrate.statistics import FOR_REPORTS
from sparsefx.errors import EmptyCalibration, UnobservedLayer
from sparsefx.graph import clone_inputs
from sparsefx.prune.weights import PrunableWeight


@dataclass
class Batch:
    """One batch. program: the number of its graph; ticket: of its live values on the shelf."""

    program: int
    ticket: int
    tokens: Tokens


@dataclass(frozen=True)
class Plan:
    """Segments that every batch goes through, one after the other.

    names, layers: of each segment; a segment without layers only has to be run. digest: of the
    batches, and of what is done with them: the graphs and their constants.
    """

    programs: list[Program]
    batches: list[Batch]
    names: list[str]
    layers: list[list[str]]
    digest: str


@dataclass(frozen=True)
class _Graph:
    """The graph of one input signature. leaves: of the first batch; live: which of them vary and
    are needed, as positions."""

    gm: fx.GraphModule
    uses: list[Use]
    leaves: list[object]
    live: list[int]


class Reader:
    """Reads batches for the `asked` weights of a model; `needs` as `run_blocks` takes it."""

    def __init__(
        self,
        model: nn.Module,
        asked: Mapping[str, PrunableWeight],
        needs: Mapping[str, frozenset[str]],
    ) -> None:
        self._model, self._needs = model, needs
        self._names = {alias: name for name, each in asked.items() for alias in each.names}
        self._observed = {name for name, kinds in needs.items() if kinds}
        self._graphs: dict[str, _Graph] = {}

    def read(self, batches: Iterable[object], shelf: Shelf) -> Plan:
        """The plan for `batches`, whose inputs are put on the shelf.

        Raises EmptyCalibration, NotCapturable, UnknownOption (of a batch), UnobservedLayer.
        """
        found: list[Batch] = []
        digest = hashlib.sha256()
        for number, batch in enumerate(batches):
            given = arguments_of(batch)
            if given.signature not in self._graphs:
                self._graphs[given.signature] = self._graph(given, number)
                for line in self._meaning(self._graphs[given.signature].gm):
                    digest.update(line.encode())
            graph = self._graphs[given.signature]
            inputs = [given.leaves[place] for place in graph.live]
            # A generator may fill the same tensor again for its next batch.
            ticket = shelf.put(inputs if isinstance(batches, Sequence) else clone_inputs(inputs))
            program = list(self._graphs).index(given.signature)
            found.append(Batch(program, ticket, tokens_of(graph.gm, given.leaves)))
            digest.update(given.signature.encode())
            for leaf in given.leaves:
                digest.update(_content(leaf))
        if not found:
            raise EmptyCalibration
        return self._plan(found, digest.hexdigest())

    def _graph(self, given: Given, number: int) -> _Graph:
        gm = captured(self._model, given, number)
        uses = layer_uses(gm, self._names)
        program = Program(gm, uses, [0], self._observed)
        live = [program.inputs.index(node) for node in program.live[0]]
        return _Graph(gm, uses, given.leaves, live)

    def _meaning(self, gm: fx.GraphModule) -> Iterator[str]:
        """What identifies a graph, but for the values of the model's parameters and buffers."""
        tables = (self._model.named_parameters, self._model.named_buffers)
        own = {name for table in tables for name, _ in table(remove_duplicate=False)}
        for path, body in gm.named_modules():  # branches are graphs of their own
            if isinstance(body, fx.GraphModule):
                yield f"{path} {body.graph.python_code('self').src}"
        for name in {str(node.target): None for node in gm.graph.find_nodes(op="get_attr")}:
            if name not in own and not is_graph(gm, name):
                yield f"{name} {content(get_tensor(gm, name))}"

    def _plan(self, batches: list[Batch], digest: str) -> Plan:
        graphs = list(self._graphs.values())
        sizes = {name: each.numel() for name, each in self._model.named_parameters()}
        blocks = repeated_blocks(sizes)
        found = [cuts(graph.gm.graph, blocks, graph.uses) for graph in graphs]
        entered = {tuple(cut.block for cut in each) for each in found}
        # Graphs that go through the blocks in different orders have no common place to stop at.
        starts = [[cut.start for cut in each] if len(entered) == 1 else [0] for each in found]
        programs = []
        for graph, start in zip(graphs, starts, strict=True):
            programs.append(Program(graph.gm, graph.uses, start, self._observed))
            programs[-1].settle(graph.leaves)
        layers = self._layers([program.uses for program in programs])
        names = [name_of(each, blocks, type(self._model).__name__) for each in layers]
        return Plan(programs, batches, names, layers, digest)

    def _layers(self, graphs: Sequence[Sequence[Sequence[Use]]]) -> list[list[str]]:
        """The asked weights of each segment; those that no graph uses and that need no statistics
        are in the last."""
        layers = [
            list(dict.fromkeys(use.parameter for uses in segment for use in uses))
            for segment in zip(*graphs, strict=True)
        ]
        missing = [name for name in self._needs if not any(name in each for each in layers)]
        unknown = [name for name in missing if self._needs[name] - FOR_REPORTS]
        if unknown:
            raise UnobservedLayer(names=", ".join(unknown[:5]) + (", ..." if unknown[5:] else ""))
        layers[-1] += missing
        return layers


def tokens_of(gm: fx.GraphModule, leaves: Sequence[object]) -> Tokens:
    """Of masks [batch, length] that are inputs named attention_mask and decoder_attention_mask;
    samples: of the first of them, else of the first tensor."""
    inputs = gm.graph.find_nodes(op="placeholder")
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]
    samples = tensors[0].shape[0] if tensors else 1
    masks: dict[str, Tensor | None] = {}
    for node, leaf in zip(inputs, leaves, strict=True):
        if node.name in _MASKS and isinstance(leaf, Tensor) and leaf.dim() == 2:
            samples = leaf.shape[0] if not masks else samples
            counted = leaf > 0
            masks[node.name] = None if bool(counted.all()) else counted
    return Tokens(samples, *(masks.get(name) for name in _MASKS))


_MASKS = ("attention_mask", "decoder_attention_mask")


def _content(leaf: object) -> bytes:
    if not isinstance(leaf, Tensor):
        return b""  # its signature says all
    return leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
