"""A model run eagerly through passes: the graphs that `compile` would see, without Inductor."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import fx, nn

from sparsefx.entry import entry
from sparsefx.graph import bind, unbind
from sparsefx.pipeline import Pass, PassContext, run

Function = Callable[..., object]


def through_passes(model: nn.Module, passes: Sequence[Pass]) -> Function:
    """The model's call; each graph that Dynamo captures of it goes through `passes`, then runs.

    Modules have the names that they have when the model is compiled; graph breaks and several
    graphs work as there. The model is not changed. Call it under torch.no_grad().
    """

    def backend(gm: fx.GraphModule, inputs: Sequence[object]) -> Function:
        bound = bind(gm, inputs)
        run(bound.gm, passes, PassContext())
        return unbind(bound).forward

    return torch.compile(entry(model), backend=backend)


def call_with(function: Function, batch: object) -> object:
    """Calls with one batch: a mapping of keywords, a tuple or list of positions, or one input."""
    if isinstance(batch, Mapping):
        return function(**batch)
    return function(*batch) if isinstance(batch, tuple | list) else function(batch)
