"""couplings(): which tensors of a model share an order of channels that leaves its function alone.

The input channels of a weight are the output channels of others: of up_proj and gate_proj before
down_proj, of v_proj (head by head, for all query heads of its group) before o_proj, of a
convolution with its batch norm before the next one. Permute all of them together and the model
computes the same, up to the order of its sums (Pool and Yu 2021, "Channel Permutations for N:M
Sparsity").
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from sparsefx.prune.permute.component import Component, Wiring, weight_nodes
from sparsefx.prune.permute.labels import NONE, ranks, varying
from sparsefx.prune.weights import PrunableWeight, prunable_weights
from sparsefx.rewrite import Decline

UNREAD = "no captured call reads it, so what its channels hang on is not known"


@dataclass(frozen=True)
class Member:
    """One axis of a parameter or buffer. labels: int64 [size of the axis], the channel of each
    place; -1: it stays. A channel may have several places, such as one in each query head."""

    name: str
    axis: int
    labels: Tensor

    def index(self, order: Tensor) -> Tensor:
        """int64 [size]: which place of the axis goes to each place, when channels take `order`.

        For anything that goes along with the axis too: norms of a layer's input, a Gram matrix.
        """
        copies = ranks(self.labels)
        width = int(copies.max()) + 1
        place = torch.arange(len(self.labels))
        held = self.labels != NONE
        where = torch.full((len(order) * width,), NONE)
        where[self.labels[held] * width + copies[held]] = place[held]
        place[held] = where[order[self.labels[held]] * width + copies[held]]
        return place


@dataclass(frozen=True)
class Coupling:
    """Axes that share an order of channels.

    blocks: int64 [channels], the block of each channel, within which it may change places; -1: it
    stays. producers: what makes the channels or goes along with them; consumers: the input axes of
    prunable weights, which N:M groups.
    """

    blocks: Tensor
    producers: tuple[Member, ...]
    consumers: tuple[Member, ...]

    @property
    def channels(self) -> int:
        """How many channels there are; an order is a permutation of 0..channels-1."""
        return len(self.blocks)

    @property
    def members(self) -> tuple[Member, ...]:
        """All that must be permuted."""
        return self.producers + self.consumers


@dataclass(frozen=True)
class Couplings:
    """found: no axis is in two; declined: for each other prunable weight, by name, why."""

    found: tuple[Coupling, ...]
    declined: Mapping[str, Decline]


def find_couplings(graphs: Sequence[fx.GraphModule], model: nn.Module) -> Couplings:
    """The couplings of the input channels of every prunable weight of `model`.

    graphs: `sparsefx.graph.capture` of the model in eval mode, one for each kind of call; their
    get_attr nodes bear the model's names and hold its own tensors. A permutation leaves unchanged
    what each of these graphs computes: other ways through the model (other branches, a cache filled
    by another call) must not read the same weights otherwise.
    """
    tensors = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    wiring = Wiring(graphs, frozenset(name for name, _ in tensors))
    weights = prunable_weights(model)
    names = {alias: weight for weight in weights.values() for alias in weight.names}
    nodes = {
        names[str(node.target)].name: node
        for node in reversed(weight_nodes(graphs))
        if node.target in names and node.users
    }
    found: list[Coupling] = []
    declined: dict[str, Decline] = {}
    done: set[str] = set()
    for name, weight in weights.items():
        if name in done:
            continue
        coupling = _coupling(wiring, nodes.get(name), weight, names)
        if isinstance(coupling, Decline):
            declined[name] = coupling
        else:
            found.append(coupling)
            done.update(names[member.name].name for member in coupling.consumers)
    return Couplings(tuple(found), {n: why for n, why in declined.items() if n not in done})


def _coupling(
    wiring: Wiring,
    node: fx.Node | None,
    weight: PrunableWeight,
    names: Mapping[str, PrunableWeight],
) -> Coupling | Decline:
    if node is None:
        return Decline(UNREAD)
    if weight.held_back.startswith("depthwise"):
        return Decline("depthwise: each filter sees one channel")
    component = Component(wiring, node, weight.axis)
    blocks = component.blocks()
    if not bool((blocks != NONE).any()):
        return Decline(component.reason)
    producers: list[Member] = []
    consumers: list[Member] = []
    for member in _members(component):
        owner = names.get(member.name)
        is_input = owner is not None and member.axis == owner.axis
        (consumers if is_input else producers).append(member)
    return Coupling(blocks, tuple(producers), tuple(consumers))


def _members(component: Component) -> list[Member]:
    """One for each tensor, in the order in which they were reached; those that stay left out."""
    members: dict[int, Member] = {}
    for node, labels in component.weights().items():
        for axis in varying(labels):
            tensor = node.meta["val"]
            members.setdefault(id(tensor), Member(str(node.target), axis, labels.flatten()))
    return list(members.values())
