"""A model run eagerly through passes: the graphs that `compile` would see, without Inductor."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from sparsefx.entry import entry
from sparsefx.errors import UnknownOption
from sparsefx.graph import bind, unbind
from sparsefx.pipeline import Pass, PassContext, run

Function = Callable[..., object]


def through_passes(model: nn.Module, passes: Sequence[Pass]) -> Function:
    """The model's call; each graph that Dynamo captures of it goes through `passes`, then runs.

    Modules have the names that they have when the model is compiled; graph breaks and several
    graphs work as there. The model is not changed. Call it under torch.no_grad().

    A graph that Dynamo captured inside a layer, behind a graph break, runs as it is: its names are
    not those of the model, and one such graph may serve every layer.
    """
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}

    def backend(gm: fx.GraphModule, inputs: Sequence[object]) -> Function:
        bound = bind(gm, inputs)
        captured = _parameters(bound.gm)
        if captured <= names and bool(captured) == bool(names):
            run(bound.gm, passes, PassContext())
        return unbind(bound).forward

    return torch.compile(entry(model), backend=backend)


def _parameters(gm: fx.GraphModule) -> set[str]:
    """Its parameters, by the names that the captured code has for them."""
    nodes = gm.graph.find_nodes(op="get_attr")
    parameters = (node for node in nodes if isinstance(node.meta.get("val"), nn.Parameter))
    return {str(node.meta.get("sparsefx_parameter")) for node in parameters}


def call_with(function: Function, batch: object) -> object:
    """Calls with one batch: a mapping of keywords, a tuple or list of positions, or one input."""
    if isinstance(batch, Mapping):
        return function(**batch)
    if isinstance(batch, tuple | list):
        return function(*batch)
    if not isinstance(batch, Tensor):
        known = "a tensor, a tuple of positional or a dict of keyword arguments"
        raise UnknownOption(option="a calibration batch", value=batch, known=known)
    return function(batch)
