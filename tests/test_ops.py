"""Every operator of the dialect means what plain PyTorch in float64 says, traced or not."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefx import epilogue as epilogues
from sparsefx import ops
from sparsefx.formats import pack_bitmap, pack_block, pack_nm
from sparsefx.packing import Packing
from sparsefx.quantise import rounded
from sparsefx.spec import NM, Block, Unstructured

Args, Kwargs = tuple[object, ...], dict[str, object]
sparsefx_ops = torch.ops.sparsefx

EPILOGUES = ["", "relu", "silu", "gelu", "gelu_tanh", "scale 0.5;add 0", "mul 1;gelu;add 0"]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def two_four(out: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    weight = draw(out, width, seed=1, dtype=dtype)
    return weight.masked_fill(~NM(2, 4).keep(weight.abs()), 0)


def by_hand(
    x: Tensor, weight: Tensor, bias: Tensor | None, epilogue: str, extras: list[Tensor]
) -> Tensor:
    """The expected result, written out step by step without the product's epilogue module."""
    acc = x @ weight.t() + (0 if bias is None else bias)
    table: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": lambda v: v.clamp(min=0),
        "silu": lambda v: v * torch.sigmoid(v),
        "gelu": lambda v: v * 0.5 * (1 + torch.erf(v / 2**0.5)),
        "gelu_tanh": lambda v: (
            0.5 * v * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (v + 0.044715 * v**3)))
        ),
        "scale 0.5": lambda v: v / 2,
        "add 0": lambda v: v + extras[0],
        "mul 1": lambda v: v * extras[1],
    }
    for step in filter(None, epilogue.split(";")):
        acc = table[step](acc)
    return acc


def packed_call(
    layout: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    epilogue: str,
    extras: list[Tensor],
) -> Tensor:
    if layout == "nm":
        values, index = pack_nm(weight, 2, 4)
        out: Tensor = sparsefx_ops.nm_linear(x, values, index, bias, 2, 4, epilogue, extras)
    elif layout == "block":
        blocks = pack_block(weight, 4, 2)
        out = sparsefx_ops.block_linear(x, *blocks, bias, 4, 2, epilogue, extras)
    else:
        out = sparsefx_ops.bitmap_linear(x, *pack_bitmap(weight), bias, epilogue, extras)
    return out


def test_mask_zeroes_and_masks_the_gradient() -> None:
    weight = draw(4, 8).requires_grad_()
    keep = draw(4, 8, seed=2) > 0
    out = sparsefx_ops.mask(weight, keep)
    assert torch.equal(out, weight * keep)
    upstream = draw(4, 8, seed=3)
    out.backward(upstream)
    assert weight.grad is not None
    assert torch.equal(weight.grad, upstream * keep)


def test_mask_drops_nan_and_infinity() -> None:
    weight = torch.tensor([float("nan"), float("inf"), 1.0])
    out = sparsefx_ops.mask(weight, torch.tensor([False, False, True]))
    assert out.tolist() == [0.0, 0.0, 1.0]


def test_mask_gradient_by_finite_differences() -> None:
    keep = draw(3, 4, seed=2) > 0
    weight = draw(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: sparsefx_ops.mask(w, keep), (weight,))


@pytest.mark.parametrize("layout", ["nm", "bitmap", "block"])
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,)])
def test_packed_linears_in_float64(
    layout: str, epilogue: str, with_bias: bool, leading: tuple[int, ...]
) -> None:
    x, weight = draw(*leading, 16), two_four(8, 16)
    bias = draw(8, seed=4) if with_bias else None
    extras = [draw(*leading, 8, seed=5), draw(*leading, 8, seed=6)]
    out = packed_call(layout, x, weight, bias, epilogue, extras)
    torch.testing.assert_close(
        out, by_hand(x, weight, bias, epilogue, extras), rtol=1e-12, atol=1e-12
    )
    assert out.is_contiguous()


@pytest.mark.parametrize("layout", ["nm", "bitmap"])
@pytest.mark.parametrize("activation", epilogues.ACTIVATIONS)
@pytest.mark.parametrize("further", ["", ";scale 0.5;mul 1;add 0"])
@pytest.mark.parametrize("leading", [(), (2, 3), (0,)])
def test_a_gate_multiplies_every_second_row_into_the_one_before(
    layout: str, activation: str, further: str, leading: tuple[int, ...]
) -> None:
    x, gate, up = draw(*leading, 16), two_four(4, 16), two_four(4, 16) * 2
    weight, bias = torch.stack((gate, up), 1).flatten(0, 1), draw(8, seed=4)
    extras = [draw(*leading, 4, seed=5), draw(*leading, 4, seed=6)]
    out = packed_call(layout, x, weight, bias, f"gate_{activation}{further}", extras)
    product = by_hand(x, gate, bias[::2], activation, []) * by_hand(x, up, bias[1::2], "", [])
    expected = product if not further else product / 2 * extras[1] + extras[0]
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert out.is_contiguous()


def test_a_gate_is_the_first_step_or_none() -> None:
    assert [epilogues.features(8, text) for text in ("", "silu", "gate_silu;silu")] == [8, 8, 4]
    with pytest.raises(ValueError, match="'silu;gate_silu' has a gate behind another step"):
        epilogues.parse("silu;gate_silu")
    with pytest.raises(ValueError, match="'gate_tanh' is not one of"):
        epilogues.parse("gate_tanh")


@pytest.mark.parametrize("layout", ["nm", "bitmap", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_packed_linears_equal_the_dense_linear_in_each_dtype(
    layout: str, dtype: torch.dtype
) -> None:
    weight = two_four(8, 16, torch.float32).to(dtype)
    x = draw(32, 3, seed=7, dtype=torch.float32).to(dtype).t()[:, :16]  # not contiguous
    bias = draw(8, seed=4, dtype=torch.float32).to(dtype)
    out = packed_call(layout, x, weight, bias, "relu", [])
    assert out.dtype == dtype
    assert torch.equal(out, F.linear(x, weight, bias).relu())


def coded_case(layout: str, kind: str) -> tuple[Packing, Tensor, Tensor]:
    """A packing with codes, its dense float64 weight [8, 48], and x [2, 3, 48]."""
    packing, pattern = {
        "nm": (Packing("nm", n=2, m=4, group=16), NM(2, 4)),
        "bitmap": (Packing("bitmap", group=32), Unstructured(0.5)),
        "block": (Packing("block", block=(2, 3)), Block(2, 3, 0.5)),
    }[layout]
    weight = draw(8, 48, seed=1)
    weight = weight.masked_fill(~pattern.keep(weight.abs()), 0)
    packing = replace(packing, values=kind)
    return packing, rounded(weight, kind, packing.tile(48)), draw(2, 3, 48)


def coded_call(packing: Packing, weight: Tensor) -> tuple[torch._ops.OpOverload, Args, Kwargs]:
    *stored, scales = packing.pack(weight)
    numbers = {"nm": (2, 4), "bitmap": (), "block": (2, 3)}[packing.layout]
    options = {"scales": scales, "kind": packing.values, "group": packing.group}
    return ops.LAYOUT_OPS[packing.layout], (*stored, None, *numbers, "silu", []), options


@pytest.mark.parametrize("layout", ["nm", "bitmap", "block"])
@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_codes_are_their_weight_in_float64(layout: str, kind: str) -> None:
    packing, weight, x = coded_case(layout, kind)
    op, args, options = coded_call(packing, weight)
    expected = F.silu(x @ weight.t())
    torch.testing.assert_close(op(x, *args, **options), expected, rtol=1e-12, atol=1e-12)
    # torch's check of the schema multiplies its inputs, which float8 cannot.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(op, (x, *args), options, test_utils=checks)


@pytest.mark.parametrize("layout", ["nm", "bitmap", "block"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dynamic_codes_round_each_row_of_x(layout: str, dtype: torch.dtype) -> None:
    packing, weight, x = coded_case(layout, "int8_dynamic")
    weight, x = rounded(weight.to(dtype), "int8", packing.tile(48)), x.to(dtype)
    x[0, 1] = 0
    op, args, options = coded_call(packing, weight)
    wide = x.double() if dtype == torch.float64 else x.float()
    scale = wide.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale == 0, 0, wide / scale).round().double()
    exact = packing.unpack(packing.pack(weight), 48, torch.float64)  # not rounded to the dtype
    expected = F.silu(((codes * scale.double()) @ exact.t()).to(dtype))
    torch.testing.assert_close(op(x, *args, **options), expected)
    assert not torch.equal(expected, F.silu(F.linear(x, weight)).to(dtype)), "rounding shows"


def every_op() -> list[tuple[torch._ops.OpOverload, tuple[object, ...]]]:
    x, weight, bias = draw(2, 3, 16), two_four(8, 16), draw(8, seed=4)
    extra = draw(2, 3, 8, seed=5)
    nm, bitmap, block = pack_nm(weight, 2, 4), pack_bitmap(weight), pack_block(weight, 2, 4)
    return [
        (sparsefx_ops.mask.default, (weight.clone().requires_grad_(), weight != 0)),
        (sparsefx_ops.nm_linear.default, (x, *nm, bias, 2, 4, "relu;add 0", [extra])),
        (sparsefx_ops.nm_linear.default, (x, *nm, None, 2, 4, "", [])),
        (sparsefx_ops.bitmap_linear.default, (x, *bitmap, bias, "mul 0", [extra])),
        (sparsefx_ops.bitmap_linear.default, (x.transpose(0, 1), *bitmap, None, "", [])),
        (sparsefx_ops.nm_linear.default, (x, *nm, bias, 2, 4, "gate_gelu", [])),
        (
            sparsefx_ops.bitmap_linear.default,
            (x, *bitmap, None, "gate_silu;add 0", [extra[..., :4]]),
        ),
        (sparsefx_ops.block_linear.default, (x, *block, bias, 2, 4, "add 0", [extra])),
        (sparsefx_ops.block_linear.default, (x, *block, None, 2, 4, "", [])),
    ]


@pytest.mark.parametrize("case", range(9))
def test_schema_fake_and_autograd_registrations(case: int) -> None:
    op, args = every_op()[case]
    torch.library.opcheck(op, args)


def test_the_stage_tables_name_every_op() -> None:
    tested = {op for op, _ in every_op()}
    assert tested == ops.MASKED_OPS | ops.PACKED_OPS


@pytest.mark.parametrize("layout", ["nm", "bitmap", "block"])
def test_under_torch_compile_in_one_graph_with_dynamic_rows(layout: str) -> None:
    weight, bias = two_four(8, 16), draw(8, seed=4)
    nm, bitmap, block = pack_nm(weight, 2, 4), pack_bitmap(weight), pack_block(weight, 2, 4)
    graphs: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(gm)
        return gm.forward

    def layer(x: Tensor) -> Tensor:
        out: Tensor = {
            "nm": lambda: sparsefx_ops.nm_linear(x, *nm, bias, 2, 4, "silu", []),
            "bitmap": lambda: sparsefx_ops.bitmap_linear(x, *bitmap, bias, "silu", []),
            "block": lambda: sparsefx_ops.block_linear(x, *block, bias, 2, 4, "silu", []),
        }[layout]()
        return out * 2

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for rows in (3, 5, 9):
        x = draw(rows, 16)
        torch.testing.assert_close(compiled(x), layer(x))
    assert len(graphs) == 1


def test_mask_trains_under_torch_compile() -> None:
    keep = draw(8, 16, seed=2) > 0
    x = draw(4, 16)
    gradients = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, backend="aot_eager", fullgraph=True)):
        torch._dynamo.reset()
        weight = draw(8, 16, seed=1).requires_grad_()
        wrap(lambda w: F.linear(x, sparsefx_ops.mask(w, keep)).square().sum())(weight).backward()
        assert weight.grad is not None
        gradients.append(weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert not gradients[0][~keep].any()
    assert gradients[0][keep].any()
