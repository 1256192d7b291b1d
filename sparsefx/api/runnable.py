"""A model and what is wanted of it -> the model compiled, in a shell of its own."""

from typing import TypeVar

import torch
from torch import nn

from sparsefx.annotations import annotations
from sparsefx.api.plans import Request, make_plan
from sparsefx.attention.wanted import Wanted
from sparsefx.compiler import Compiler
from sparsefx.entry import entry, shell
from sparsefx.session import Session, remember_model

M = TypeVar("M", bound=nn.Module)


def runnable(model: M, request: Request, wanted: Wanted, dynamic: bool | None = None) -> M:
    """A shell of `model` whose call runs through SparseFX; `model` itself is not touched.

    wanted: attentions to make sparse; where no recipe asks for any, the model's annotations hold.
    dynamic: as in torch.compile.
    """
    session = Session(type(model).__name__, request.target.name, request.guard, tuned=request.tuned)
    decided = annotations(model)
    plan = make_plan(request, wanted.beside(model), patterns=decided, trained=frozenset(decided))
    fast = shell(model)
    traced = torch.compile(entry(fast), backend=Compiler(plan, session), dynamic=dynamic)
    fast._compiled_call_impl = traced  # what nn.Module.compile sets, and __call__ runs
    remember_model(fast, session)
    return fast
