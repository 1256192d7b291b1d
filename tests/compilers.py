"""Compilers for tests: everything lowered, and graphs run as they are instead of by Inductor."""

from collections.abc import Sequence

from torch import Tensor, fx

from sparsefx.api import targets
from sparsefx.compiler import Compiler, Plan
from sparsefx.guard import Verdict
from sparsefx.passes import pipelines
from sparsefx.session import Session
from sparsefx.target import LinearSpec, Lowering


def accept(spec: LinearSpec, weight: Tensor, bias: Tensor | None, lowering: Lowering) -> Verdict:
    """A guard that lowers everything."""
    return Verdict(dense_us=2.0, sparse_us=1.0, how="modelled")


def refuse(spec: LinearSpec, weight: Tensor, bias: Tensor | None, lowering: Lowering) -> Verdict:
    """A guard that lowers nothing."""
    return Verdict(dense_us=1.0, sparse_us=2.0, how="modelled")


def run_graph(gm: fx.GraphModule, inputs: Sequence[object]) -> fx.GraphModule:
    """Runs the rewritten graph as it is; Inductor has tests of its own."""
    return gm


def eager_compiler(title: str, judge: object = accept) -> Compiler:
    """A backend that lowers what `judge` lets pass and leaves Inductor out."""
    passes = pipelines.inference(targets()["cpu"], judge, proof=True)  # type: ignore[arg-type]
    plan = Plan(passes, pipelines.training(frozenset()), emit=run_graph)
    return Compiler(plan, Session(title, "cpu", "test"))
