"""200 random modules through every pass and both doors, against the masked model in float64."""

import copy
from collections.abc import Iterable
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from sparsefx.api import targets
from sparsefx.graph import capture
from sparsefx.passes import pipelines
from sparsefx.pipeline import PassContext, run
from sparsefx.report import Row
from tests.compilers import JUDGES, eager_compiler
from tests.random_modules import Sample, sample

SEEDS = range(200)
EPSILON = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def oracle(module: nn.Module, x: Tensor) -> Tensor:
    """The module's own meaning in float64."""
    result: Tensor = copy.deepcopy(module).double()(x.double())
    return result


def assert_close(result: Tensor, case: Sample, where: str) -> None:
    """Within the dtype's rounding of the oracle, the dense model's own error being part of it."""
    expected = oracle(case.module, case.x)
    own = (case.module(case.x).double() - expected).abs().max()
    error = (result.double() - expected).abs().max()
    bound = 3 * own + EPSILON[case.x.dtype] * (1 + expected.abs().max())
    assert error <= bound, f"seed {case.seed}, {where}: error {error:.3g}, bound {bound:.3g}"


def assert_counts(counts: dict[str, int], case: Sample, rows: Iterable[Row]) -> None:
    """Each linear that reads a weight with a pattern is found, masked, packed and lowered once.

    Of k linears that became one call, k - 1 are not lowered any more.
    """
    packed = counts["pack_nm"] + counts["pack_block"] + counts["pack_bitmap"]
    sizes = [1 + len(row.merged.split(", ")) for row in rows if row.merged]
    calls = sum(Fraction(1, size) for size in sizes)
    lowered = counts["lower"] + len(sizes) - calls
    found = (counts["detect"], counts["insert_masks"], packed, lowered)
    assert found == (case.sparse_calls,) * 4, f"seed {case.seed}: {counts}"
    assert counts["fold_masks"] == 0, f"seed {case.seed}: a mask was left to fold"


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_every_stage_of_the_export_door(seed: int) -> None:
    case = sample(seed)
    gm = capture(case.module, (case.x,))
    ctx = PassContext()
    counts: dict[str, int] = {}
    for each in pipelines.inference(targets()["cpu"], JUDGES):
        counts |= run(gm, (each,), ctx)
        assert_close(gm(case.x), case, f"after {each.name}")
    assert_counts(counts, case, ctx.rows.values())
    linears = [row for row in ctx.rows.values() if row.op == "linear"]
    assert len(linears) == case.linear_calls, f"seed {seed}"
    assert all(row.kernel or row.reason for row in ctx.rows.values()), f"seed {seed}"


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_the_dynamo_door(seed: int) -> None:
    case = sample(seed)
    torch._dynamo.reset()
    compiler = eager_compiler("random")
    compiled = torch.compile(case.module, backend=compiler, fullgraph=True)
    assert_close(compiled(case.x), case, "dynamo door")
    (graph,) = compiler.session.graphs
    assert_counts(graph.counts, case, graph.rows)
