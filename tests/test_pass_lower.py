"""Who gets a packed node, what the report says of it, and the way back to dense."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsefx.epilogue import GATES
from sparsefx.errors import KernelBuildFailed
from sparsefx.graph import capture
from sparsefx.normalise import normalise
from sparsefx.passes.lower import Lower
from sparsefx.pipeline import PassContext, run
from sparsefx.spec import Block
from sparsefx.target import LinearSpec, Lowering
from tests.compilers import accept, refuse
from tests.pass_models import (
    FUSED,
    HALF,
    TWO_FOUR,
    WIDTH,
    Around,
    after,
    assert_same_numbers,
    bias,
    calls,
    one,
    sparse,
    transposed,
    x_of,
)
from tests.plain_target import PlainNM, plain


def lowered(model: nn.Module, target: object, judge: object = accept) -> tuple[object, ...]:
    passes = (*FUSED, Lower(target, judge))  # type: ignore[arg-type]
    gm, ctx, counts = after(model, passes)
    assert_same_numbers(gm, model)
    return gm, next(iter(ctx.rows.values())), counts["lower"], ctx


def test_lowering_bakes_the_weight_and_fills_the_row() -> None:
    gm, row, count, ctx = lowered(one(lambda s, x: F.relu(s.l(x))), plain())
    assert (count, row.kernel, row.reason, row.how) == (1, "plain_nm", "", "modelled")
    assert (row.dense_us, row.sparse_us) == (2.0, 1.0)
    assert row.stored_bytes == WIDTH * WIDTH // 2 * 8 + WIDTH * WIDTH // 2 // 4
    assert calls(gm) == ["sparsefx_plain.linear.default"]
    assert ctx.baked == {"l.weight"}


@dataclass(frozen=True)
class Takes(PlainNM):
    """Takes weights of one layout and kind of values, and keeps what it was given."""

    values: str = ""
    seen: list[LinearSpec] = field(default_factory=list, hash=False)

    def accepts(self, spec: LinearSpec) -> str | None:
        return None if spec.values == self.values else f"no {spec.values} values"

    def lower(self, spec: LinearSpec, packed: tuple[Tensor, ...]) -> Lowering:
        self.seen.append(spec)
        raise KernelBuildFailed(kernel=self.name, rule=f"{len(packed)} tensors")


def test_blocks_are_offered_as_a_bitmap_too() -> None:
    torch.manual_seed(0)
    model = Around(lambda s, x: s.l(x), l=sparse(Block(16, 16, 0.75), 64, 64))
    blocks, bitmap = Takes("blocks", "block"), Takes("bitmaps", "bitmap")
    passes = (*FUSED, Lower(plain(bitmap, blocks), accept))  # type: ignore[arg-type]
    gm, ctx, _ = after(model, passes, x_of(3, 64))
    assert_same_numbers(gm, model, x_of(3, 64))
    assert [spec.block for spec in (*blocks.seen, *bitmap.seen)] == [(16, 16), (0, 0)]
    assert [spec.density for spec in (*blocks.seen, *bitmap.seen)] == [0.25, 0.25]
    reason = next(iter(ctx.rows.values())).reason
    assert reason.index("blocks:") < reason.index("bitmaps:"), "its own layout first"


CHAIN: dict[str, Callable[..., object]] = {
    "relu": lambda s, x: F.relu(s.l(x)),
    "silu": lambda s, x: F.silu(s.l(x)),
    "gelu": lambda s, x: F.gelu(s.l(x)),
    "gelu tanh": lambda s, x: F.gelu(s.l(x), approximate="tanh"),
    "chain": lambda s, x: x + F.gelu(s.l(x) * 0.5) * (x + 1),
    "product": lambda s, x: x @ s.w,
    "addmm": lambda s, x: F.relu(torch.addmm(s.b, x, s.w)),
}


@pytest.mark.parametrize("name", CHAIN)
def test_what_does_not_win_is_dense_again_step_by_step(name: str) -> None:
    model = one(CHAIN[name], w=transposed(TWO_FOUR), b=bias(WIDTH))
    gm, row, count, ctx = lowered(model, plain(), refuse)
    assert (count, row.kernel, ctx.baked) == (0, "", set())
    assert row.reason.startswith("plain_nm: ")
    assert (row.dense_us, row.sparse_us) == (1.0, 2.0)
    names = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    assert names <= set(dict(model.named_parameters()))


@pytest.mark.parametrize(
    ("kernels", "reason"),
    [
        ((PlainNM(refuses="not today"),), "plain_nm: not today"),
        ((PlainNM(fails=True),), "plain_nm: kernel plain_nm did not compile: no compiler"),
        (
            (PlainNM("first", refuses="no"), PlainNM("second", refuses="nor I")),
            "first: no; second: nor I",
        ),
    ],
)
def test_every_refusal_is_told(kernels: tuple[PlainNM, ...], reason: str) -> None:
    _, row, count, _ = lowered(one(lambda s, x: s.l(x)), plain(*kernels))
    assert (count, row.kernel) == (0, "")
    assert row.reason.startswith(reason)


def test_the_first_kernel_that_accepts_and_builds_is_taken() -> None:
    target = plain(PlainNM("first", refuses="no"), PlainNM("second", fails=True), PlainNM("third"))
    _, row, count, _ = lowered(one(lambda s, x: s.l(x)), target)
    assert (count, row.kernel, row.reason) == (1, "third", "")


def test_a_target_without_a_kernel_for_the_layout_says_so() -> None:
    model = Around(lambda s, x: s.l(x), l=sparse(HALF))
    _, row, count, _ = lowered(model, plain())
    assert (count, row.reason) == (0, "target plain has no bitmap kernel")


def test_weights_made_in_inference_mode_are_not_baked() -> None:
    """Torch counts no changes of them, so that a change could not be noticed."""
    with torch.inference_mode():
        model = one(lambda s, x: s.l(x))
        _, row, count, ctx = lowered(model, plain())
    assert (count, ctx.baked) == (0, set())
    assert "inference mode" in row.reason


def test_a_layer_under_autocast_stays_dense() -> None:
    """Its result is bfloat16 and its weight is not: a kernel would give the weight's type."""
    gm = capture(one(lambda s, x: s.l(x)), (x_of(),))
    (linear,) = (n for n in gm.graph.nodes if n.target is torch.ops.aten.linear.default)
    linear.meta["val"] = linear.meta["val"].bfloat16()
    ctx = PassContext()
    counts = run(normalise(gm), FUSED, ctx)
    assert counts["pack_nm"] == 0
    assert "autocast" in next(iter(ctx.rows.values())).reason


@pytest.mark.parametrize("gate", GATES)
def test_a_gate_that_does_not_win_is_dense_again(gate: str) -> None:
    model = one(lambda s, x: s.l(x))
    gm = normalise(capture(model, (x_of(),)))
    ctx = PassContext()
    run(gm, FUSED, ctx)
    (node,) = (n for n in gm.graph.nodes if n.target is torch.ops.sparsefx.nm_linear.default)
    node.update_arg(6, f"{gate};scale 2.0")
    node.meta["val"] = node.meta["val"][..., ::2]
    gm.recompile()
    expected = gm(x_of())
    run(gm, (Lower(plain(), refuse),), ctx)
    assert "aten.slice.Tensor" in calls(gm)
    torch.testing.assert_close(gm(x_of()), expected)
