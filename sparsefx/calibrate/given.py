"""A calibration batch as the arguments of a call, and the model's graph for it."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MethodType

import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from sparsefx.attributes import set_tensor
from sparsefx.calibrate.inputs import mark_input_axes
from sparsefx.calibrate.segments import storages, written
from sparsefx.entry import shell
from sparsefx.errors import NotCapturable, UnknownOption
from sparsefx.graph import capture
from sparsefx.prune.weights import prunable_weights


@dataclass(frozen=True)
class Given:
    """A batch as arguments, their leaves, and what a graph is captured for."""

    args: tuple[object, ...]
    kwargs: dict[str, object]
    leaves: list[object]
    signature: str


def arguments_of(batch: object) -> Given:
    """A batch as a call. Raises UnknownOption for what is none."""
    args: tuple[object, ...] = ()
    kwargs: dict[str, object] = {}
    if isinstance(batch, Mapping):
        kwargs = dict(batch)
    elif isinstance(batch, tuple | list):
        args = tuple(batch)
    elif isinstance(batch, Tensor):
        args = (batch,)
    else:
        known = "a tensor, a tuple of positional or a dict of keyword arguments"
        raise UnknownOption(option="a calibration batch", value=batch, known=known)
    leaves, spec = pytree.tree_flatten((args, kwargs))
    described = [
        f"{leaf.dtype}{list(leaf.shape)}@{leaf.device}" if isinstance(leaf, Tensor) else repr(leaf)
        for leaf in leaves
    ]
    return Given(args, kwargs, leaves, f"{spec} {described}")


def tensors_in(output: object) -> tuple[Tensor, ...]:
    """Every tensor of a model's output, in order."""
    return tuple(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))


def captured(
    model: nn.Module,
    given: Given,
    number: int = 0,
    result: Callable[[object, Mapping[str, object]], object] | None = None,
) -> fx.GraphModule:
    """The graph of one signature, whose outputs are tensors only: caches are of no use here.

    result: what is made of the model's output and its keyword arguments, within the graph.
    `number` is the batch's, for errors. What the model's own code sets on it, buffers or any other
    attributes, it sets on a twin, and buffers that the graph writes to are its own. Raises
    NotCapturable.
    """
    twin = shell(model)
    own = _forward_of(twin, model)

    @functools.wraps(own)
    def forward(*args: object, **kwargs: object) -> tuple[Tensor, ...]:
        output = own(*args, **kwargs)
        return tensors_in(output if result is None else result(output, kwargs))

    twin.__dict__["forward"] = forward
    try:
        gm = capture(twin, given.args, given.kwargs)
    except Exception as error:  # torch.export, and the model in it, raise anything
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        rule = f"{type(error).__name__}: {reason}"
        name = type(model).__name__
        raise NotCapturable(model=name, batch=number, rule=rule) from error
    _own_what_it_writes(gm)
    weights = prunable_weights(model).values()
    mark_input_axes(gm, {alias: weight.axis for weight in weights for alias in weight.names})
    return gm


def _own_what_it_writes(gm: fx.GraphModule) -> None:
    changed = {storage for node in gm.graph.nodes for storage in written(node)}
    copies: dict[int, Tensor] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        if changed.intersection(storages(node)):
            value: Tensor = node.meta["val"]
            node.meta["val"] = copies.setdefault(id(value), value.detach().clone())
            set_tensor(gm, str(node.target), node.meta["val"])


def _forward_of(twin: nn.Module, model: nn.Module) -> Callable[..., object]:
    """The model's forward, its class's or one set on the instance, with the twin for `self`."""
    found: Callable[..., object] = twin.forward
    if isinstance(found, MethodType) and found.__self__ is model:  # set on the instance, and copied
        return MethodType(found.__func__, twin)
    return found
