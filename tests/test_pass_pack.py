"""Which weights and which spellings of a linear are packed, and which are left as they are."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsefx.spec import NM, Block, Unstructured
from tests.golden import assert_golden
from tests.pass_models import (
    FUSED,
    PACKED,
    TWO_FOUR,
    WIDTH,
    Around,
    after,
    assert_same_numbers,
    bias,
    one,
    sparse,
    text,
    transposed,
    x_of,
)


@pytest.mark.parametrize(
    ("pattern", "width", "packed"),
    [
        (NM(2, 4), 16, (1, 0)),
        (NM(1, 4), 16, (1, 0)),
        (NM(3, 4), 16, (1, 0)),
        (NM(5, 8), 16, (1, 0)),
        (NM(8, 16), 16, (1, 0)),
        (NM(7, 8), 16, (0, 0)),  # an eighth of zeros: a bitmap needs a quarter
        (NM(2, 5), 20, (0, 1)),  # no such groups: unstructured
        (NM(2, 4), 18, (0, 1)),  # m does not divide the width
        (Unstructured(0.5), 16, (0, 1)),
        (None, 16, (0, 0)),
    ],
)
def test_which_packing_takes_a_weight(
    pattern: NM | Unstructured | None, width: int, packed: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    if isinstance(pattern, NM) and width % pattern.m:
        linear = sparse(None, width)
        with torch.no_grad():
            linear.weight[:, :16] *= pattern.keep(linear.weight[:, :16].abs())
    else:
        linear = sparse(pattern, width)
    model = Around(lambda s, x: s.l(x), l=linear)
    gm, _, counts = after(model, PACKED, x_of(3, width))
    assert (counts["pack_nm"], counts["pack_bitmap"]) == packed
    assert_same_numbers(gm, model, x_of(3, width))


@pytest.mark.parametrize(
    ("pattern", "packed"),
    [
        (Block(16, 16, 0.5), "block"),
        (Block(64, 64, 0.75), "block"),
        (Block(1, 16, 0.75), "block"),
        (Block(1, 16, 0.25), "bitmap"),  # 32 bits a block's column are more than a bit an element
        (Block(4, 8, 0.5), "bitmap"),  # no such blocks are looked for
    ],
    ids=str,
)
def test_blocks_are_packed_where_that_is_smaller(pattern: Block, packed: str) -> None:
    torch.manual_seed(0)
    model = Around(lambda s, x: s.l(x), l=sparse(pattern, 128, 128))
    gm, _, counts = after(model, PACKED, x_of(3, 128))
    assert counts[f"pack_{packed}"] == 1
    assert counts["pack_block"] + counts["pack_bitmap"] == 1
    assert_same_numbers(gm, model, x_of(3, 128))


def test_text_of_packed_blocks() -> None:
    torch.manual_seed(0)
    linear = sparse(Block(16, 16, 0.5), 64, 32)
    model = Around(lambda s, x: F.relu(s.l(x)), l=linear)
    gm, _, counts = after(model, FUSED, x_of(3, 64))
    assert (counts["pack_block"], counts["fuse_epilogue"]) == (1, 1)
    assert_golden("passes/pack_block.txt", text(gm))
    assert_same_numbers(gm, model, x_of(3, 64))
    made = [
        node for node in gm.graph.nodes if node.target is torch.ops.sparsefx.block_linear.default
    ]
    assert [node.meta["val"].shape for node in made] == [(3, 32)]


PACKS = {
    "addmm": lambda s, x: torch.addmm(s.b, x, s.w),
    "addmm, all by name": lambda s, x: torch.addmm(input=s.b, mat1=x, mat2=s.w, beta=1),
    "matmul": lambda s, x: x @ s.w,
    "mm": lambda s, x: torch.mm(x, s.w),
    "a vector": lambda s, x: x[0] @ s.w,
    "three axes": lambda s, x: x.view(1, 3, WIDTH) @ s.w,
    "both sides": lambda s, x: s.w @ s.w + x[:1],
}


@pytest.mark.parametrize("name", PACKS)
def test_every_way_to_write_a_linear_is_packed(name: str) -> None:
    model = Around(PACKS[name], w=transposed(TWO_FOUR), b=bias(WIDTH))
    gm, _, counts = after(model, PACKED)
    assert (counts["detect"], counts["insert_masks"], counts["pack_nm"]) == (1, 1, 1)
    assert_same_numbers(gm, model)


DECLINES = {
    "addmm with beta": (
        lambda s, x: torch.addmm(s.b, x, s.w, beta=2),
        bias(WIDTH),
        "",
    ),
    "addmm with alpha": (lambda s, x: torch.addmm(s.b, x, s.w, alpha=2), bias(WIDTH), ""),
    "addmm of a matrix": (lambda s, x: torch.addmm(x, x, s.w), bias(WIDTH), "no bias vector"),
    "addmm of one number": (lambda s, x: torch.addmm(s.b, x, s.w), bias(1), "no bias vector"),
    "bias of one number": (
        lambda s, x: F.linear(x, s.l.weight, s.b),
        bias(1),
        "no bias vector of 16",
    ),
    "bias without axes": (lambda s, x: F.linear(x, s.l.weight, s.b[0]), bias(1), "no bias vector"),
    "bias matrix": (lambda s, x: F.linear(x, s.l.weight, s.b), bias(3, WIDTH), "no bias vector"),
}


@pytest.mark.parametrize("name", DECLINES)
def test_linears_that_no_packing_means_are_left(name: str) -> None:
    forward, b, reason = DECLINES[name]
    model = one(forward, w=transposed(TWO_FOUR), b=b)
    gm, ctx, counts = after(model, FUSED)
    assert (counts["insert_masks"], counts["pack_nm"], counts["pack_bitmap"]) == (1, 0, 0)
    assert counts["fold_masks"] == 1
    assert reason in next(iter(ctx.rows.values())).reason
    assert_same_numbers(gm, model)


LEFT = {
    "a convolution": lambda s, x: s.conv(x.view(1, 3, WIDTH)),
    "a weight computed in the graph": lambda s, x: F.linear(x, s.l.weight * 2),
    "a part of a weight": lambda s, x: F.linear(x, s.l.weight[:8]),
    "a weight on the left": lambda s, x: s.l.weight @ x.t(),
    "a batch of weights": lambda s, x: x @ s.stack,
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_no_linear_of_a_constant_is_left(name: str) -> None:
    model = one(
        LEFT[name],
        conv=nn.Conv1d(3, 3, 3, dtype=torch.float64),
        stack=nn.Parameter(torch.zeros(2, WIDTH, WIDTH, dtype=torch.float64)),
    )
    gm, _, counts = after(model, FUSED)
    assert set(counts.values()) == {0}
    assert_same_numbers(gm, model)
