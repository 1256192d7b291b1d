"""Generated C++ convolutions with sparse weights against F.conv2d in float64."""

import itertools
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefx.codegen.cpp import emit, isa
from sparsefx.codegen.cpp.conv import CppConv
from sparsefx.convolutions import ConvSpec, Taps, pack_taps
from sparsefx.errors import DtypeMismatch, ShapeMismatch
from tests.golden import assert_golden

ISAS = [each.name for each in isa.VECTOR_ISAS if each.present()]
BOUND = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}
LAYOUTS = (torch.contiguous_format, torch.channels_last)
# Smaller than a register, of several tiles, very flat.
SIZES = ((3, 3), (14, 11), (3, 150))
SPEC = ConvSpec(
    out_channels=35, in_channels=21, window=(3, 3), stride=1, padding=1, density=0.3,
    dtype=torch.float32, batch=1, height=9, width=9,
)  # fmt: skip


def weight_of(spec: ConvSpec) -> Tensor:
    random = torch.Generator().manual_seed(7)
    weight = torch.randn(spec.out_channels, spec.in_channels, *spec.window, generator=random)
    weight *= torch.rand(weight.shape, generator=random) < spec.density
    weight[3] = 0  # a channel that keeps nothing
    return weight.to(spec.dtype)


def check(spec: ConvSpec, kernel: CppConv, x: Tensor, last: bool, bias: Tensor | None) -> None:
    weight = weight_of(spec)
    lowering = kernel.lower(spec)
    rest = (list(spec.shape), spec.stride, spec.padding, last, lowering.handle)
    got = lowering.op(x, list(pack_taps(weight)), bias, *rest)
    wide = None if bias is None else bias.double()
    want = F.conv2d(x.double(), weight.double(), wide, spec.stride, spec.padding)
    assert got.shape == want.shape and got.dtype is spec.dtype
    assert got.is_contiguous(memory_format=LAYOUTS[last])
    if want.numel():
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error <= BOUND[spec.dtype], (spec, x.shape, x.stride(), error)


def images(spec: ConvSpec, batch: int, size: tuple[int, int]) -> Tensor:
    random = torch.Generator().manual_seed(batch)
    return torch.randn(batch, spec.in_channels, *size, generator=random).to(spec.dtype)


@pytest.mark.parametrize("isa_name", ISAS)
@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_every_window_stride_padding_and_layout(dtype: torch.dtype, isa_name: str) -> None:
    random = torch.Generator().manual_seed(1)
    bias = torch.randn(SPEC.out_channels, generator=random).to(dtype)
    ways = itertools.product((1, 3), (1, 2), (0, 1), SIZES, LAYOUTS)
    for number, (window, stride, padding, size, layout) in enumerate(ways):
        batch, last = (1, 3)[number % 2], number % 3 == 0
        spec = replace(SPEC, window=(window,) * 2, stride=stride, padding=padding, dtype=dtype)
        x = images(spec, batch, size).contiguous(memory_format=layout)
        check(spec, CppConv(isa_name), x, last, bias if stride == 1 else None)


def test_whole_registers_of_channels_and_more_images_than_are_staged_together() -> None:
    spec = replace(SPEC, out_channels=64, in_channels=256, density=0.1, window=(1, 1))
    check(spec, CppConv(), images(spec, 3, (56, 56)), True, None)
    spec = replace(SPEC, out_channels=32, in_channels=64)
    x = images(spec, 2, (190, 190)).contiguous(memory_format=torch.channels_last)
    check(spec, CppConv(), x, False, None)


def test_no_images() -> None:
    check(SPEC, CppConv(), images(SPEC, 0, (9, 9)), False, None)


def test_input_of_any_strides() -> None:
    x = images(SPEC, 2, (40, 20))
    for view in (x.transpose(2, 3), x[:, :, ::2], x[:1].expand(3, -1, -1, -1)):
        check(SPEC, CppConv(), view, False, None)


def test_a_weight_without_any_nonzero_gives_the_bias() -> None:
    lowering = CppConv().lower(SPEC)
    taps, bias, shape = pack_taps(torch.zeros(5, 21, 3, 3)), torch.arange(5.0), [5, 21, 3, 3]
    y = lowering.op(images(SPEC, 1, (8, 8)), list(taps), bias, shape, 1, 1, False, lowering.handle)
    assert torch.equal(y, bias[:, None, None].expand(1, 5, 8, 8))


def test_refuses_what_would_read_out_of_bounds() -> None:
    lowering = CppConv().lower(SPEC)
    taps, x = pack_taps(weight_of(SPEC)), images(SPEC, 1, (9, 9))

    def run(x: Tensor, taps: Taps, bias: Tensor | None = None, window: int = 3) -> Tensor:
        shape = [35, 21, window, window]
        y: Tensor = lowering.op(x, list(taps), bias, shape, 1, 0, False, lowering.handle)
        return y

    with pytest.raises(DtypeMismatch, match=r"x is torch\.float16"):
        run(x.half(), taps)
    with pytest.raises(DtypeMismatch, match=r"columns is torch\.int64"):
        run(x, taps._replace(columns=taps.columns.long()))
    with pytest.raises(ShapeMismatch, match="must fit into its planes"):
        run(x[:, :, :2], taps)
    with pytest.raises(ShapeMismatch, match="no window"):
        run(x, taps, window=5)
    with pytest.raises(ShapeMismatch, match="values has shape"):
        run(x, taps._replace(values=taps.values[1:]))
    with pytest.raises(ShapeMismatch, match="reads 21 channels"):
        run(x[:, 1:], taps)
    with pytest.raises(ShapeMismatch, match="row_ptr has shape"):
        run(x, taps._replace(row_ptr=taps.row_ptr[1:]))
    with pytest.raises(ShapeMismatch, match="bias has shape"):
        run(x, taps, torch.ones(3))


def test_accepts_or_says_why() -> None:
    kernel = CppConv()
    assert kernel.accepts(SPEC) is None
    assert "window" in str(kernel.accepts(replace(SPEC, window=(5, 5))))
    assert "stride" in str(kernel.accepts(replace(SPEC, stride=3)))
    assert "padding" in str(kernel.accepts(replace(SPEC, padding=2)))
    assert "float64" in str(kernel.accepts(replace(SPEC, dtype=torch.float64)))


def test_text_of_the_kernel() -> None:
    assert_golden("cpp_conv2d_float32_avx512.cpp", emit.conv_source(torch.float32, isa.AVX512))


def test_template_compiles_as_it_is() -> None:
    template = Path(emit.__file__).parent / "templates" / "conv.cpp"
    command = ["g++", "-std=c++17", "-fopenmp", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    subprocess.run([*command, "-Wno-psabi", str(template)], check=True)
