"""What detect finds and says; what is masked, by which name, and how masks are folded."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import sparsefx
from sparsefx.graph import capture
from sparsefx.passes.detect import Detect
from sparsefx.passes.fold_masks import FoldMasks
from sparsefx.passes.insert_masks import InsertMasks
from sparsefx.pipeline import PassContext, run
from sparsefx.rewrite import Site
from sparsefx.spec import NM
from tests.pass_models import (
    FUSED,
    MASKED,
    PACKED,
    TWO_FOUR,
    WIDTH,
    Around,
    Net,
    after,
    assert_same_numbers,
    bias,
    calls,
    one,
    sparse,
    transposed,
    x_of,
)

Rows = dict[str, tuple[str, str, str]]


def rows(model: nn.Module, *args: Tensor) -> Rows:
    _, ctx, _ = after(model, (Detect(),), *args)
    return {row.name: (row.op, row.pattern, row.reason) for row in ctx.rows.values()}


def test_detect_tells_patterns_and_reasons() -> None:
    found = rows(Net())
    assert found["up"] == ("linear", "2:4", "")
    assert found["down"] == ("linear", "unstructured 75%", "")
    assert found["head"][2].startswith("0.0 % of the weights are zero")


def test_detect_gives_each_kind_of_layer_a_row() -> None:
    model = Around(
        lambda s, x: (
            s.conv(x) + s.same(x),
            s.up(x),
            F.scaled_dot_product_attention(x, x, x),
            x @ s.experts,
            F.linear(x, s.l.weight * 2),
        ),
        conv=nn.Conv1d(3, 3, 3, padding=1, dtype=torch.float64),
        same=nn.Conv1d(3, 3, 3, padding="same", dtype=torch.float64),
        up=nn.ConvTranspose1d(3, 3, 3, dtype=torch.float64),
        experts=nn.Parameter(x_of(2, WIDTH, WIDTH)),
        l=sparse(TWO_FOUR),
    ).eval()
    found = rows(model, x_of(2, 3, WIDTH))
    ops = [op for op, _, _ in found.values()]
    assert sorted(ops) == ["attention", "conv", "conv", "conv", "experts", "linear"]
    assert all(reason for _, _, reason in found.values())
    assert "computed or changed in the graph" in found["linear"][2]


def dynamo_rows(model: nn.Module, *args: Tensor) -> Rows:
    fast = sparsefx.compile(model, guard="model")
    with torch.no_grad():
        torch.testing.assert_close(fast(*args), model(*args))
    return {row.name: (row.op, row.pattern, row.reason) for row in sparsefx.explain(fast).rows}


@pytest.mark.parametrize("door", [rows, dynamo_rows])
def test_products_that_no_rule_reads_as_linears_get_a_row(door: Callable[..., Rows]) -> None:
    model = Around(
        lambda s, x: (
            x @ s.turned.T
            + torch.einsum("bi,oi->bo", x, s.summed)
            + (s.left @ x.t()).t()
            + torch.addmm(s.bias, x, s.added.t())
            + torch.addmm(s.shift, x, x.t() @ x)
        ),
        turned=transposed(TWO_FOUR),
        summed=transposed(TWO_FOUR),
        left=transposed(TWO_FOUR),
        added=transposed(TWO_FOUR),
        bias=bias(WIDTH),
        shift=bias(1, WIDTH),
    ).eval()
    found = door(model, x_of(4, WIDTH))
    assert set(found) == {"turned", "summed", "left", "added"}
    assert {op for op, _, _ in found.values()} == {"linear"}
    assert all("transposed there" in reason for _, _, reason in found.values())


class OwnAttention(nn.Module):
    """Attention as people write it."""

    def __init__(self, einsum: bool) -> None:
        super().__init__()
        self.softmax, self.einsum = nn.Softmax(dim=-1), einsum

    def forward(self, q: Tensor) -> Tensor:
        if self.einsum:
            scores = torch.einsum("bqd,bkd->bqk", q, q)
            return torch.einsum("bqk,bkd->bqd", scores.softmax(-1), q)
        result: Tensor = self.softmax(q @ q.mT / 4) @ q
        return result


@pytest.mark.parametrize("door", [rows, dynamo_rows])
@pytest.mark.parametrize("einsum", [False, True])
def test_attention_written_by_hand_gets_a_row(door: Callable[..., Rows], einsum: bool) -> None:
    found = door(OwnAttention(einsum).eval(), x_of(2, 3, WIDTH))
    assert [op for op, _, _ in found.values()] == ["attention"]


def test_detect_takes_embeddings_of_positions_for_no_experts() -> None:
    model = one(lambda s, x: s.l(x) + s.p, p=nn.Parameter(x_of(1, 3, WIDTH)))
    assert list(rows(model, x_of(2, 3, WIDTH))) == ["l"]


def test_detect_says_the_shape_with_rows_that_vary() -> None:
    gm = capture(Net(), (x_of(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    ctx = PassContext()
    run(gm, (Detect(),), ctx)
    assert [row.shape for row in ctx.rows.values()] == ["32x16 @ 3..", "16x32 @ 3..", "8x16 @ 3.."]


def test_masks_only_what_is_named() -> None:
    gm, _, counts = after(Net(), (Detect(), InsertMasks(frozenset({"down.weight", "absent"}))))
    assert counts["insert_masks"] == 1
    assert calls(gm).count("sparsefx.mask.default") == 1


def test_no_mask_without_detect() -> None:
    _, _, counts = after(Net(), (InsertMasks(),))
    assert counts["insert_masks"] == 0


def test_a_masked_weight_keeps_its_gradient_masked() -> None:
    model = Net()
    gm, _, _ = after(model, MASKED)
    gm(x_of()).square().sum().backward()
    gradient, weight = model.up.weight.grad, model.up.weight
    assert gradient is not None
    assert not gradient[weight == 0].any()
    assert gradient[weight != 0].all()


def test_one_weight_used_twice_shares_its_mask_and_packed_form() -> None:
    model = one(lambda s, x: s.l(torch.tanh(s.l(x))))
    gm, _, counts = after(model, PACKED)
    assert (counts["insert_masks"], counts["pack_nm"]) == (2, 2)
    stored = [str(node.target) for node in gm.graph.find_nodes(op="get_attr")]
    assert sorted(set(stored)) == ["l.bias", "l.weight_index", "l.weight_values"]
    assert_same_numbers(gm, model)


def test_names_of_the_models_own_buffers_are_not_taken() -> None:
    """A model may have a `weight_keep` or a `weight_values` itself."""
    for name in ("weight_keep", "weight_values"):
        linear = sparse(TWO_FOUR)
        linear.register_buffer(name, x_of(WIDTH, WIDTH))
        model = Around(lambda s, x, n=name: s.l(x) + getattr(s.l, n).sum(), l=linear)
        gm, _, counts = after(model, FUSED)
        assert counts["pack_nm"] == 1
        assert_same_numbers(gm, model)


def test_folding_a_mask_that_changes_nothing_gives_the_parameter_back() -> None:
    model = Net()
    gm, _, _ = after(model, (*MASKED, FoldMasks()))
    names = {str(node.target) for node in gm.graph.find_nodes(op="get_attr")}
    assert names == {name for name, _ in model.named_parameters()}
    assert gm.get_parameter("up.weight") is model.up.weight


def mask_by_hand(gm: fx.GraphModule, keep: Tensor, computed: bool = False) -> None:
    """linear(x, w, b) -> linear(x, mask(w, keep), b) for the one linear of a graph."""
    (linear,) = (n for n in gm.graph.nodes if n.target is torch.ops.aten.linear.default)
    site = Site(gm, linear, "test")
    node = site.constant("keep", keep)
    if computed:
        node = site.call(torch.ops.aten.logical_not.default, node)
        node.meta["val"] = ~keep
    weight = linear.args[1]
    mask = site.call(torch.ops.sparsefx.mask.default, weight, node)
    mask.meta["val"] = weight.meta["val"]
    linear.replace_input_with(weight, mask)


def test_folding_a_mask_that_cuts_makes_a_new_weight() -> None:
    model = one(lambda s, x: s.l(x))
    keep = NM(1, 4).keep(model.l.weight.abs())
    gm = capture(model, (x_of(),))
    mask_by_hand(gm, keep)
    assert run(gm, (FoldMasks(),), PassContext()) == {"fold_masks": 1}
    assert calls(gm) == ["aten.linear.default"]
    before = model.l.weight.detach().clone()
    with torch.no_grad():
        expected = F.linear(x_of(), before * keep, model.l.bias)
        torch.testing.assert_close(gm(x_of()), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(model.l.weight, before)


def test_a_computed_mask_is_not_folded() -> None:
    gm = capture(one(lambda s, x: s.l(x)), (x_of(),))
    mask_by_hand(gm, torch.ones(WIDTH, WIDTH, dtype=torch.bool), computed=True)
    gm.recompile()
    assert FoldMasks()(gm, PassContext()) == 0
