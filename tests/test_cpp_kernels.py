"""Generated C++ kernels against the meaning of the dialect ops in float64."""

import itertools
import zlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparsefx import ops
from sparsefx.codegen.cpp import TARGET_KERNELS, CppLinear, isa
from sparsefx.epilogue import Step, features, is_gated, parse
from sparsefx.errors import DtypeMismatch, KernelNotFound, ShapeMismatch, UnknownOption
from sparsefx.formats import pack_bitmap, pack_nm
from sparsefx.spec import NM
from sparsefx.target import LinearSpec, Lowering

# ISA names that this machine can run; every machine can run the portable one.
ISAS = [each.name for each in isa.LINEAR_ISAS if each.present()]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PATTERNS = [(2, 4), (1, 4), (4, 8), (2, 8), (3, 16), 0.5, 0.7, 0.9]
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
EPILOGUES = [
    "",
    "relu",
    "silu",
    "gelu",
    "gelu_tanh",
    "scale -0.5",
    "add 0",
    "mul 0",
    "gate_relu;add 0",
    "gate_silu",
    "gate_gelu",
    "gate_gelu_tanh",
    "silu;mul 0;scale 1e-05;add 1",
]


def _distinct() -> list[tuple[tuple[int, int] | float, torch.dtype, str]]:
    """Every pattern in float32, some in 16 bits; each once where instruction sets share a text."""
    found = {}
    for pattern, dtype, name in itertools.product(PATTERNS, DTYPES, ISAS):
        few = dtype is torch.float32 or pattern in ((4, 8), (3, 16), 0.5, 0.9)
        if few:
            template = isa.named(name, isa.LINEAR_ISAS).block(_spec(pattern, dtype))
            found.setdefault((pattern, dtype, template), name)
    return [(pattern, dtype, name) for (pattern, dtype, _), name in found.items()]


def _spec(
    pattern: tuple[int, int] | float, dtype: torch.dtype, out: int = 1, width: int = 16
) -> LinearSpec:
    n, m = pattern if isinstance(pattern, tuple) else (0, 0)
    layout, density = ("nm", n / m) if isinstance(pattern, tuple) else ("bitmap", 1 - pattern)
    return LinearSpec(layout, out, width, n, m, density, dtype, False, "", rows=1, rows_vary=True)


class Case:
    """A random packed linear, its lowering and its meaning in float64."""

    def __init__(
        self,
        pattern: tuple[int, int] | float,
        dtype: torch.dtype,
        out: int,
        width: int,
        isa_name: str | None,
        bias: bool = False,
        epilogue: str = "",
    ) -> None:
        self.name = f"{pattern} {dtype} {out}x{width} {isa_name} bias={bias} {epilogue!r}"
        self.seed = zlib.crc32(self.name.encode())
        self.random = torch.Generator().manual_seed(self.seed)
        self.dtype, self.out, self.width, self.epilogue = dtype, out, width, epilogue
        weight = self.tensor(out, width)
        plain = _spec(pattern, dtype, out, width)
        self.pattern, self.layout, self.n, self.m = pattern, plain.layout, plain.n, plain.m
        if isinstance(pattern, tuple):
            weight = weight * NM(*pattern).keep(weight.abs())
            self.packed: tuple[Tensor, ...] = pack_nm(weight, *pattern)
        else:
            keep = torch.rand(out, width, generator=self.random) >= pattern
            keep[1 % out] = False  # an empty row
            keep[3 % out] = pattern < 1  # a row that keeps all
            weight = weight * keep
            self.packed = pack_bitmap(weight)
        self.weight = weight
        self.bias = self.tensor(out) if bias else None
        self.kernel = CppLinear(self.layout, isa_name)
        self.lowering = self.lower()

    def tensor(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random).to(self.dtype)

    def spec(self) -> LinearSpec:
        plain = _spec(self.pattern, self.dtype, self.out, self.width)
        return replace(plain, has_bias=self.bias is not None, epilogue=self.epilogue)

    def lower(self) -> Lowering:
        spec = self.spec()
        assert self.kernel.accepts(spec) is None, self
        return self.kernel.lower(spec, self.packed)

    def extras(self, *leading: int) -> list[Tensor]:
        binary = [step for step in parse(self.epilogue) if step.op in ("add", "mul")]
        count = max((int(step.operand or 0) + 1 for step in binary), default=0)
        return [self.tensor(*leading, features(self.out, self.epilogue)) for _ in range(count)]

    def run(self, x: Tensor, extras: list[Tensor]) -> Tensor:
        return self.lowering.run(x, self.bias, extras)

    def meaning(self, x: Tensor, extras: list[Tensor]) -> Tensor:
        bias = None if self.bias is None else self.bias.double()
        wide = [extra.double() for extra in extras]
        values, *rest = self.packed
        packed = (values.double(), *rest)
        if self.layout == "nm":
            return ops.nm_linear(x.double(), *packed, bias, self.n, self.m, self.epilogue, wide)
        return ops.bitmap_linear(x.double(), *packed, bias, self.epilogue, wide)

    def check(self, x: Tensor, extras: list[Tensor] | None = None) -> None:
        extras = self.extras(*x.shape[:-1]) if extras is None else extras
        got, want = self.run(x, extras), self.meaning(x, extras)
        assert got.shape == want.shape and got.dtype == self.dtype, self
        assert got.is_contiguous(), self
        if want.numel():
            terms = x.double().abs() @ self.weight.double().abs().t()  # what may have cancelled
            factors = 2 if is_gated(self.epilogue) else 1
            bound = ROUNDING[self.dtype] * want.abs().max() + 1e-6 * terms.max() ** factors
            error = (got.double() - want).abs().max()
            assert error <= bound, f"{self} x={tuple(x.shape)}: {error:.2e} > {bound:.2e}"

    def __str__(self) -> str:
        return f"[{self.name} seed={self.seed}]"


@pytest.mark.parametrize(("pattern", "dtype", "isa_name"), _distinct(), ids=str)
def test_every_row_count_and_odd_size(
    pattern: tuple[int, int] | float, dtype: torch.dtype, isa_name: str
) -> None:
    unit = pattern[1] if isinstance(pattern, tuple) else 1
    widths = {unit, -(-100 // unit) * unit, 96} | ({7, 8, 17, 35} if unit == 1 else {unit * 3})
    for out, width in itertools.product((1, 4, 7), sorted(widths)):
        case = Case(pattern, dtype, out, width, isa_name)
        for rows in (0, 1, 3, 5, 8, 33):
            case.check(case.tensor(rows, width))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_every_epilogue(epilogue: str, bias: bool) -> None:
    case = Case((2, 4), torch.float32, 6, 64, "portable", bias, epilogue)
    case.check(case.tensor(5, 64))


@pytest.mark.parametrize("isa_name", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pattern", [(4, 8), 0.5], ids=str)
def test_a_long_epilogue_everywhere(
    pattern: tuple[int, int] | float, dtype: torch.dtype, isa_name: str
) -> None:
    case = Case(pattern, dtype, 6, 64, isa_name, True, EPILOGUES[-1])
    case.check(case.tensor(5, 64))


@pytest.mark.parametrize("isa_name", ISAS)
def test_a_gate_everywhere(isa_name: str) -> None:
    case = Case(0.5, torch.bfloat16, 14, 72, isa_name, True, "gate_silu;mul 0")
    for rows in (1, 5, 40):
        case.check(case.tensor(rows, 72))


@pytest.mark.parametrize("isa_name", ISAS)
@pytest.mark.parametrize("pattern", [(2, 4), 0.5], ids=str)
def test_more_rows_than_are_staged_at_once(pattern: tuple[int, int] | float, isa_name: str) -> None:
    case = Case(pattern, torch.float32, 9, 48, isa_name, epilogue="add 0")
    case.check(case.tensor(151, 48))


@pytest.mark.parametrize("isa_name", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_without_any_value(dtype: torch.dtype, isa_name: str) -> None:
    case = Case(1.0, dtype, 5, 40, isa_name, bias=True)
    assert case.packed[0].numel() == 0
    case.check(case.tensor(3, 40))


@pytest.mark.parametrize("isa_name", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_survives_the_way_through_float32(
    dtype: torch.dtype, isa_name: str
) -> None:
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    weight = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=dtype)
    spec = LinearSpec("nm", 1, 4, 2, 4, 0.25, dtype, False, "add 0", 1, True)
    low = CppLinear("nm", isa_name).lower(spec, pack_nm(weight, 2, 4))
    zeros = torch.zeros(65536, 4, dtype=dtype)
    got = low.run(zeros, extras=[every[:, None]])[:, 0]
    torch.testing.assert_close(got, every + 0.0, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("isa_name", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_to_the_nearest_even_as_torch_does(dtype: torch.dtype, isa_name: str) -> None:
    random = torch.Generator().manual_seed(11)
    x = torch.randn(4096, generator=random).mul(10 ** torch.linspace(-9, 6, 4096)).to(dtype)
    weight = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=dtype)
    spec = LinearSpec("nm", 1, 4, 2, 4, 0.25, dtype, False, "scale 0.3", 1, True)
    low = CppLinear("nm", isa_name).lower(spec, pack_nm(weight, 2, 4))
    padded = torch.nn.functional.pad(x[:, None], (0, 3))
    got = low.run(padded)[:, 0]
    torch.testing.assert_close(got, (x.float() * 0.3).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("isa_name", ISAS)
def test_nan_and_infinity_in_x_come_out(isa_name: str) -> None:
    case = Case((2, 4), torch.float32, 4, 32, isa_name, epilogue="relu")
    x = case.tensor(3, 32)
    x[1] = float("nan")
    got = case.run(x, [])
    assert got[1].isnan().all(), case
    torch.testing.assert_close(
        got[[0, 2]].double(), case.meaning(x, [])[[0, 2]], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("pattern", [(2, 4), 0.5], ids=str)
def test_any_rank_and_strides(pattern: tuple[int, int] | float) -> None:
    case = Case(pattern, torch.float32, 7, 32, None, bias=True, epilogue="mul 0;add 1")
    case.check(case.tensor(32))
    case.check(case.tensor(2, 3, 32))
    case.check(case.tensor(2, 0, 32))
    case.check(case.tensor(32, 5).t())
    case.check(case.tensor(5, 64)[:, ::2])
    case.check(case.tensor(1, 32).expand(4, 32))
    expanded, strided = case.tensor(1, 7).expand(6, 7), case.tensor(7, 6).t()
    case.check(case.tensor(6, 32), [expanded, strided])
    case.bias = case.tensor(1).expand(7)
    case.check(case.tensor(6, 32))


def test_threads_do_not_change_a_bit() -> None:
    case = Case(0.5, torch.float32, 130, 512, None)
    x = case.tensor(5, 512)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = case.run(x, [])
        torch.set_num_threads(2)
        two = case.run(x, [])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, two), case


def test_weights_changed_in_place_are_used() -> None:
    case = Case((2, 4), torch.float32, 4, 32, None)
    x = case.tensor(2, 32)
    before = case.run(x, [])
    case.lowering.packed[0].mul_(2)
    assert torch.equal(case.run(x, []), before * 2)


def test_refuses_what_would_read_out_of_bounds() -> None:
    case = Case((2, 4), torch.float32, 4, 32, None)
    low, x = case.lowering, case.tensor(2, 32)
    values, bits = low.packed
    with pytest.raises(DtypeMismatch, match=r"x is torch.float16.*torch.float32"):
        low.run(x.half())
    with pytest.raises(DtypeMismatch, match="values is torch.bfloat16"):
        low.run(x, packed=[values.bfloat16(), bits])
    with pytest.raises(ShapeMismatch, match="values has shape"):
        low.run(case.tensor(2, 64))
    with pytest.raises(ShapeMismatch, match="bias=False and 0 extras"):
        low.run(x, case.tensor(4))
    with pytest.raises(ShapeMismatch, match="bias=False and 0 extras"):
        low.run(x, extras=[x])
    with pytest.raises(KernelNotFound, match="no_such_kernel"):
        low.op(x, [values, bits], None, [], "no_such_kernel", 4)
    with pytest.raises(KernelNotFound):
        low.op(x, [values, bits], None, [], "../../lib/libc", 4)
    with pytest.raises(ShapeMismatch, match="5 features"):
        low.op(x, [values, bits], None, [], low.handle, 5)


def test_refuses_a_bitmap_of_another_size() -> None:
    case = Case(0.5, torch.float32, 4, 32, None, bias=True)
    low, x = case.lowering, case.tensor(2, 32)
    values, bits, row_ptr = low.packed
    with pytest.raises(ShapeMismatch, match="bytes of index or bits of a row"):
        low.run(case.tensor(2, 48), case.bias)
    with pytest.raises(ShapeMismatch, match="row_ptr has shape"):
        low.run(x, case.bias, packed=[values, bits, row_ptr[:-1]])
    with pytest.raises(ShapeMismatch, match="bias has shape"):
        low.run(x, case.tensor(3))
    with pytest.raises(DtypeMismatch, match="bias is torch.float64"):
        low.run(x, torch.zeros(4).double())


def test_accepts_or_says_why() -> None:
    nm, bitmap, _ = TARGET_KERNELS
    assert (nm.name, bitmap.name) == ("cpp_nm_linear", "cpp_bitmap_linear")
    spec = Case((2, 4), torch.float32, 4, 32, None).spec()
    assert nm.accepts(spec) is None
    assert "reads the bitmap layout" in str(bitmap.accepts(spec))
    wide = LinearSpec("nm", 4, 32, 2, 4, 0.5, torch.float64, False, "", 1, True)
    assert "float64 is not one of" in str(nm.accepts(wide))
    odd = LinearSpec("nm", 4, 30, 2, 4, 0.5, torch.float32, False, "", 1, True)
    assert "does not divide 30" in str(nm.accepts(odd))
    with pytest.raises(UnknownOption, match="portable"):
        CppLinear("nm", "sse9").accepts(spec)


def test_declines_an_instruction_set_that_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Case((2, 4), torch.float32, 4, 32, None).spec()
    monkeypatch.setattr(isa, "_cpu_flags", lambda: frozenset())
    assert isa.best() is isa.PORTABLE
    assert CppLinear("nm", "avx512").accepts(spec) == "this CPU has no avx512"
    assert CppLinear("nm").accepts(spec) is None


@pytest.mark.parametrize("pattern", [(2, 4), 0.5], ids=str)
def test_opaque_in_compiled_and_exported_graphs(pattern: tuple[int, int] | float) -> None:
    case = Case(pattern, torch.float32, 6, 32, None, bias=True, epilogue="silu;mul 0")

    class Net(torch.nn.Module):
        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            return case.run(x + 1, [gate]) * 2

    x, gate = case.tensor(3, 32), case.tensor(3, 6)
    want = case.meaning(x + 1, [gate]) * 2
    rows = torch.export.Dim("rows", min=2, max=64)
    exported = torch.export.export(Net(), (x, gate), dynamic_shapes=({0: rows}, {0: rows}))
    assert str(case.lowering.op) in [str(node.target) for node in exported.graph.nodes]
    compiled = torch.compile(Net(), fullgraph=True, dynamic=True)
    for module in (exported.module(), compiled):
        torch.testing.assert_close(module(x, gate).double(), want, rtol=1e-5, atol=1e-5)
        more, gates = case.tensor(5, 32), case.tensor(5, 6)
        again = case.meaning(more + 1, [gates]) * 2
        torch.testing.assert_close(module(more, gates).double(), again, rtol=1e-5, atol=1e-5)


def test_fake_result_is_exact() -> None:
    case = Case((2, 4), torch.bfloat16, 6, 32, None)
    low = case.lowering
    for x in (case.tensor(32), case.tensor(3, 32), case.tensor(32, 3).t()):
        arguments = (x, list(low.packed), None, [], low.handle, low.features)
        torch.library.opcheck(low.op, arguments)


def test_epilogue_steps_are_all_covered() -> None:
    from sparsefx.epilogue import ACTIVATIONS, BINARY, GATES

    covered = {step.op for text in EPILOGUES for step in parse(text)}
    assert covered == {*ACTIVATIONS, *GATES, *BINARY, "scale"}
    assert Step("scale", 1e-05) in parse(EPILOGUES[-1])


@pytest.mark.parametrize("isa_name", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("width", [63, 127, 1000])
def test_last_blocks_that_keep_more_than_a_register(
    width: int, dtype: torch.dtype, isa_name: str
) -> None:
    """Few are kept, but more than 16 of the columns behind the last whole block in some rows."""
    case = Case(0.84, dtype, 1024, width, isa_name)
    rest = case.weight[:, width // 64 * 64 :]
    assert (rest != 0).sum(1).max() > 16, case
    for rows in (1, 2):
        case.check(case.tensor(rows, width))


@pytest.mark.parametrize("rows", [1, 3, 8, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_columns(dtype: torch.dtype, rows: int) -> None:
    case = Case(0.9, dtype, 16, 64, None)
    empty = [torch.empty(0, dtype=dtype), torch.empty(16, 0, dtype=torch.uint8)]
    x, row_ptr = torch.empty(rows, 0, dtype=dtype), torch.zeros(17, dtype=torch.int32)
    lowering = case.lowering
    found = lowering.op(x, [*empty, row_ptr], None, [], lowering.handle, 16)
    assert torch.equal(found, torch.zeros(rows, 16, dtype=dtype))
