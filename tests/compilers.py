"""Compilers for tests: everything lowered, and graphs run as they are instead of by Inductor."""

from collections.abc import Sequence

from torch import Tensor, fx

from sparsefx.api import targets
from sparsefx.attention.guard import AttentionVerdict
from sparsefx.attention.wanted import Wanted
from sparsefx.compiler import Compiler, Plan
from sparsefx.convolutions import ConvLowering, ConvSpec, Taps
from sparsefx.guard import Verdict
from sparsefx.passes import pipelines
from sparsefx.session import Session
from sparsefx.target import AttentionLowering, AttentionSpec, LinearSpec, Lowering


def accept(spec: LinearSpec, weight: Tensor, bias: Tensor | None, lowering: Lowering) -> Verdict:
    """A guard that lowers everything."""
    return Verdict(dense_us=2.0, sparse_us=1.0, how="modelled")


def refuse(spec: LinearSpec, weight: Tensor, bias: Tensor | None, lowering: Lowering) -> Verdict:
    """A guard that lowers nothing."""
    return Verdict(dense_us=1.0, sparse_us=2.0, how="modelled")


def run_graph(gm: fx.GraphModule, inputs: Sequence[object]) -> fx.GraphModule:
    """Runs the rewritten graph as it is; Inductor has tests of its own."""
    return gm


def accept_attention(spec: AttentionSpec, lowering: AttentionLowering) -> AttentionVerdict:
    """A guard that lowers every sparse attention, at every length."""
    return AttentionVerdict(2.0, 1.0, "modelled", spec.keys, from_keys=0)


def refuse_attention(spec: AttentionSpec, lowering: AttentionLowering) -> AttentionVerdict:
    """A guard that lowers none."""
    return AttentionVerdict(1.0, 2.0, "modelled", spec.keys, from_keys=None)


def accept_conv(
    spec: ConvSpec, weight: Tensor, taps: Taps, bias: Tensor | None, lowering: ConvLowering
) -> Verdict:
    """A guard that lowers every sparse convolution."""
    return Verdict(dense_us=2.0, sparse_us=1.0, how="modelled")


JUDGES = pipelines.Judges(accept, accept_attention, accept_conv, proof=True)


def eager_compiler(
    title: str, judge: object = accept, wanted: Wanted = pipelines.DENSE
) -> Compiler:
    """A backend that lowers what `judge` lets pass and leaves Inductor out."""
    judges = pipelines.Judges(judge, accept_attention, accept_conv, proof=True)  # type: ignore[arg-type]
    passes = pipelines.inference(targets()["cpu"], judges, wanted)
    plan = Plan(passes, pipelines.training(frozenset()), emit=run_graph)
    return Compiler(plan, Session(title, "cpu", "test"))
