"""A captured graph cut into segments that run one after the other, a block each.

Nodes stay in their order. A segment begins where the graph enters a block that has asked layers, or
comes to an asked layer outside of all blocks; what follows runs with it. A cut is left out where it
would part two uses of one asked weight, or a write in place from the tensor it writes to. What
no asked layer depends on is never run.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx
from torch._ops import OpOverload

from sparsefx.calibrate.blocks import block_of, common_owner
from sparsefx.calibrate.inputs import Use
from sparsefx.candidates import module_path, parameter_name
from sparsefx.mutation import storage_of


@dataclass(frozen=True)
class Cut:
    """Where a segment begins: at graph position `start`, in `block` (None: outside of all)."""

    block: str | None
    start: int


def cuts(graph: fx.Graph, blocks: frozenset[str], uses: Sequence[Use]) -> list[Cut]:
    """The cuts of a graph, the first at 0. Its first segment has no layer if the next says so."""
    asked = {block for use in uses if (block := block_of(use.parameter, blocks)) is not None}
    outside = {use.node for use in uses if block_of(use.parameter, blocks) is None}
    found = [Cut(None, 0)]
    for position, node in enumerate(graph.nodes):
        block = _block(node, blocks)
        enters = block in asked or (block is None and node in outside)
        if enters and block != found[-1].block:
            found.append(Cut(block, position))
    bonds = [*_bonds_of_weights(graph, uses), *_bonds_of_writes(graph)]
    return [cut for cut in found if not any(first < cut.start <= last for first, last in bonds)]


def name_of(names: Sequence[str], blocks: frozenset[str], model: str) -> str:
    """What a segment with these weights is called: its block, else the module that holds them."""
    inside = {block_of(name, blocks) for name in names}
    block = inside.pop() if len(inside) == 1 else None
    return block or common_owner(names) or model


def _block(node: fx.Node, blocks: frozenset[str]) -> str | None:
    """By the module it was traced from, else by a weight that it reads."""
    if node.op != "call_function":
        return None
    weights = (source for source in node.all_input_nodes if source.op == "get_attr")
    paths = [module_path(node), *(parameter_name(weight) for weight in weights)]
    return next((block for path in paths if (block := block_of(path, blocks)) is not None), None)


def _bonds_of_weights(graph: fx.Graph, uses: Sequence[Use]) -> Iterator[tuple[int, int]]:
    """(first, last) position of each asked weight's uses."""
    order = _positions(graph)
    places: dict[str, list[int]] = {}
    for use in uses:
        places.setdefault(use.parameter, []).append(order[use.node])
    yield from ((min(each), max(each)) for each in places.values())


def _bonds_of_writes(graph: fx.Graph) -> Iterator[tuple[int, int]]:
    """(where a tensor is made, where it is last written to in place)."""
    made: dict[int, int] = {}
    for position, node in enumerate(graph.nodes):
        if node.op == "call_function":
            for storage in written(node):
                if storage in made:
                    yield made[storage], position
        if node.op != "get_attr":
            for storage in storages(node):
                made.setdefault(storage, position)


def written(node: fx.Node) -> Iterator[int]:
    """The storages that an operator writes to in place."""
    if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
        return
    schema = node.target._schema.arguments
    given = dict(zip((each.name for each in schema), node.args, strict=False)) | node.kwargs
    for argument in schema:
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = given.get(argument.name)
            for each in value if isinstance(value, list | tuple) else [value]:
                if isinstance(each, fx.Node):
                    yield from storages(each)


def storages(node: fx.Node) -> list[int]:
    """Identities of the memory that a node's value lies in; of views those of their base."""
    leaves = torch.utils._pytree.tree_leaves(node.meta.get("val"))
    found = (storage_of(leaf) for leaf in leaves)
    return [storage for storage in found if storage is not None]


def _positions(graph: fx.Graph) -> dict[fx.Node, int]:
    return {node: position for position, node in enumerate(graph.nodes)}
