"""How a model is run: its call as a function of our own, a shell, eval mode for a while."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def entry(model: nn.Module) -> Callable[..., object]:
    """The model's call as a function of ours, with a code object of its own.

    Dynamo skips frames of torch itself, such as the forward of nn.Sequential, and counts recompiles
    by code object: models that shared one would use up each other's limit.
    """

    def call(*args: object, **kwargs: object) -> object:
        return model._call_impl(*args, **kwargs)

    # The name is that of a model: torch remembers sizes that vary by file, line and name.
    name = f"call_{type(model).__name__}_{id(model):x}"
    call.__code__ = call.__code__.replace(co_name=name)
    return call


def shell(model: M) -> M:
    """A model of the same class over the same submodules and weights, to be compiled alone."""
    twin = copy.copy(model)
    for table in ("_modules", "_parameters", "_buffers"):
        twin.__dict__[table] = dict(model.__dict__[table])
    return twin


@contextlib.contextmanager
def inferring(model: nn.Module) -> Iterator[None]:
    """The model in eval mode: with dropout it computes something else at each call."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
