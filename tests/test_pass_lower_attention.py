"""Sparse attentions go to kernels that win, from the length on at which they win."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from sparsefx.attention.guard import AttentionVerdict
from sparsefx.attention.thresholds import SkipThresholds
from sparsefx.attention.wanted import Wanted
from sparsefx.compiler import Compiler, Plan
from sparsefx.passes import pipelines
from sparsefx.passes.grouped_heads import for_dense
from sparsefx.report import Row
from sparsefx.rewrite import Site
from sparsefx.session import Session
from sparsefx.target import AttentionLowering, AttentionSpec, Target
from tests.compilers import accept, accept_attention, accept_conv, refuse_attention, run_graph
from tests.plain_attention import CALLS, PlainSkip, plain

FACTORS = (30.0, 60.0, 90.0, 120.0)
KNOWN = SkipThresholds(
    FACTORS, FACTORS, (32, 16), "sink_diagonal", keys=(64, 200), skipped=(0.5, 0.4)
)


class Layer(nn.Module):
    """Grouped causal self-attention, 4 heads of 8 that share 2 KV heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(3 * x).split((32, 16, 16), -1)
        q, k, v = (each.unflatten(-1, (-1, 8)).transpose(1, 2) for each in (q, k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = Layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def wins_from(keys: int) -> Any:  # Any: an AttentionJudge
    def judge(spec: AttentionSpec, lowering: AttentionLowering) -> AttentionVerdict:
        return AttentionVerdict(2.0, 1.0, "measured", 4 * keys, from_keys=keys)

    return judge


def compiled(
    target: Target,
    judge: Any = accept_attention,
    proof: bool = True,
    known: SkipThresholds = KNOWN,
    dynamic: bool | None = None,
) -> tuple[Model, Any, Compiler]:
    torch._dynamo.reset()
    model = Model().eval()
    judges = pipelines.Judges(accept, judge, accept_conv, proof)
    passes = pipelines.inference(target, judges, Wanted({"layer": known}))
    plan = Plan(passes, pipelines.training(frozenset()), emit=run_graph)
    compiler = Compiler(plan, Session("model", "cpu", "test"))
    return model, torch.compile(model, backend=compiler, dynamic=dynamic), compiler


def attention_row(compiler: Compiler, graph: int = -1) -> Row:
    rows = [row for row in compiler.session.graphs[graph].rows if row.op == "attention"]
    assert len(rows) == 1 and not rows[0].violations()
    return rows[0]


@torch.no_grad()
def test_a_kernel_that_wins_runs_and_its_row_tells_all() -> None:
    model, fast, compiler = compiled(plain())
    x = torch.randn(2, 100, 32)
    CALLS.clear()
    result = fast(x)
    assert CALLS == {"right": 1}
    row = attention_row(compiler)
    assert (row.name, row.kernel, row.pattern) == ("layer", "plain_right", "skip-softmax 32x16")
    assert row.shape == "4x8 heads (2 KV) @ 100 x 100"
    assert (row.skipped, row.crossover, row.dense_us, row.sparse_us) == (0.5, 0, 2.0, 1.0)
    assert "factors 30..120" in row.thresholds
    assert not torch.allclose(result, model(x))  # it is another function


@torch.no_grad()
@pytest.mark.parametrize(
    ("target", "judge", "reason"),
    [
        (plain(), refuse_attention, "plain_right: the sparse attention is not faster than dense"),
        (plain(PlainSkip(refuses="not today")), accept_attention, "plain_right: not today"),
        (plain(PlainSkip(fails=True)), accept_attention, "no compiler"),
        (plain(PlainSkip(method="theta")), accept_attention, "no kernel for skip_softmax"),
    ],
)
def test_otherwise_it_is_dense_again_with_a_reason(target: Target, judge: Any, reason: str) -> None:
    model, fast, compiler = compiled(target, judge)
    x = torch.randn(2, 100, 32)
    torch.testing.assert_close(fast(x), model(x))
    row = attention_row(compiler)
    assert not row.kernel and reason in row.reason


@torch.no_grad()
def test_the_next_kernel_is_asked() -> None:
    _, fast, compiler = compiled(plain(PlainSkip(refuses="no"), PlainSkip("fast")))
    fast(torch.randn(1, 64, 32))
    assert attention_row(compiler).kernel == "plain_fast"


@torch.no_grad()
def test_below_the_crossover_each_call_is_dense_in_one_graph() -> None:
    model, fast, compiler = compiled(plain(), wins_from(96), dynamic=True)
    CALLS.clear()
    for length in (64, 95, 96, 150):
        x = torch.randn(1, length, 32)
        result = fast(x)
        if length < 96:
            torch.testing.assert_close(result, model(x))
    assert CALLS == {"right dense": 2, "right": 2}
    assert len(compiler.session.graphs) == 1
    assert attention_row(compiler).crossover == 96


@torch.no_grad()
def test_unknown_sparsity_is_dense_under_the_guard_and_runs_without() -> None:
    given = SkipThresholds(FACTORS, FACTORS, (32, 16), "ascending")
    x = torch.randn(1, 100, 32)
    model, fast, compiler = compiled(plain(), known=given)
    torch.testing.assert_close(fast(x), model(x))
    assert "pass calibration=" in attention_row(compiler).reason
    _, fast, compiler = compiled(plain(), known=given, proof=False)
    assert not torch.allclose(fast(x), model(x))
    assert attention_row(compiler).kernel == "plain_right"


@torch.no_grad()
def test_a_longer_row_than_calibrated_warns_once() -> None:
    from sparsefx.attention import route

    route._warn_once.cache_clear()
    _, fast, _ = compiled(plain(), dynamic=True)
    fast(torch.randn(1, 200, 32))
    with pytest.warns(route.BeyondCalibration, match="than the 200 of its calibration"):
        fast(torch.randn(1, 201, 32))
    fast(torch.randn(1, 230, 32))  # a second warning would be an error here


def test_a_masked_attention_that_stays_dense_on_cuda_repeats_its_heads_again() -> None:
    """Its fast backends take a mask or groups, not both: no slower than it was written."""
    mode = torch._subclasses.FakeTensorMode()

    def value(device: str, *shape: int) -> Tensor:
        with mode:
            return torch.empty(shape, device=device)

    for device, masked, calls in (("cuda", True, 2), ("cuda", False, 0), ("cpu", True, 0)):
        graph = fx.Graph()
        q, k, v = (graph.placeholder(name) for name in "qkv")
        for node, heads in ((q, 4), (k, 2), (v, 2)):
            node.meta["val"] = value(device, 1, heads, 40, 8)
        root = graph.output(q)
        site = Site(fx.GraphModule({}, graph), root, "test")
        new_k, _, grouped = for_dense(site, q, k, v, masked)
        assert grouped is (calls == 0)
        assert new_k.meta["val"].shape[1] == (4 if calls else 2)
        assert len([node for node in graph.nodes if node.op == "call_function"]) == calls
