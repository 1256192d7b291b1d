"""The C++ half of sparsefx_cpp::linear: which calls it takes, all of them as by Python."""

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch import Tensor

from sparsefx.codegen.cpp import build, operator
from sparsefx.errors import KernelBuildFailed, SparseFXError
from sparsefx.packing import Packing
from tests import test_cpp_block, test_cpp_kernels, test_cpp_quantised
from tests.cpp_halves import HALVES, Given, needs_python

FLOAT, BF16, HALF = torch.float32, torch.bfloat16, torch.float16
MISTAKES = (SparseFXError, RuntimeError, IndexError, ValueError)


def plain(
    pattern: tuple[int, int] | float, dtype: torch.dtype = FLOAT, epilogue: str = ""
) -> Given:
    """An N:M or bitmap linear of 6 x 32, with a bias where there is an epilogue."""
    case = test_cpp_kernels.Case(pattern, dtype, 6, 32, None, bool(epilogue), epilogue)
    return Given.of(case.lowering, case.tensor(3, 32), case.bias, case.extras(3))


def quantised(values: str, n: int, dtype: torch.dtype, group: int = 0) -> Given:
    layout, m = ("nm", 4) if n else ("bitmap", 0)
    case = test_cpp_quantised.Case(Packing(layout, n, m, values=values, group=group), dtype)
    return Given.of(case.lower(None, case.tensors()), case.x(3))


def block(dtype: torch.dtype = FLOAT, epilogue: str = "") -> Given:
    case = test_cpp_block.Case((8, 16), dtype, None, epilogue)
    extras = [case.tensor(3, case.out // (2 if "gate" in epilogue else 1))] if epilogue else []
    return Given.of(case.lowering, case.tensor(3, case.width), case.bias, extras)


KINDS: dict[str, Callable[[], Given]] = {
    "2:4": lambda: plain((2, 4)),
    "2:4 bf16": lambda: plain((2, 4), BF16),
    "bitmap": lambda: plain(0.5),
    "bitmap half": lambda: plain(0.9, HALF),
    "two extras": lambda: plain((4, 8), FLOAT, "silu;mul 0;scale 1e-05;add 1"),
    "gate": lambda: plain(0.5, FLOAT, "gate_silu"),
    "int8": lambda: quantised("int8", 2, FLOAT),
    "int4 by 16": lambda: quantised("int4", 2, BF16, 16),
    "bitmap int8_dynamic": lambda: quantised("int8_dynamic", 0, FLOAT),
    "block": lambda: block(),
    "block gate": lambda: block(HALF, "gate_gelu;add 0"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_takes_every_kind_of_kernel(kind: str) -> None:
    given = KINDS[kind]()
    want = given.by_python()
    for x in (given.x, given.x[:1], given.x[:0], given.x.view(1, 3, -1), given.x[0]):
        rows = slice(0, x.numel() // max(given.x.shape[-1], 1))
        leading = (*x.shape[:-1], given.features)
        one = replace(given, x=x, extras=[e[rows].reshape(leading) for e in given.extras])
        assert not needs_python(one.by_operator)
        got = one.by_operator()
        assert got.is_contiguous() and torch.equal(got, want[rows].reshape(leading))


def strided(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor], -1)[..., 0]


UNUSUAL: dict[str, Callable[[Given], Given]] = {
    "x": lambda g: replace(g, x=strided(g.x)),
    "values": lambda g: replace(g, packed=[strided(g.packed[0]), *g.packed[1:]]),
    "keys": lambda g: replace(g, packed=[g.packed[0], strided(g.packed[1]), *g.packed[2:]]),
    "row_ptr": lambda g: replace(g, packed=[*g.packed[:-1], strided(g.packed[-1])]),
    "bias": lambda g: replace(g, bias=None if g.bias is None else strided(g.bias)),
    "extra": lambda g: replace(g, extras=[strided(e) for e in g.extras]),
}


@pytest.mark.parametrize("what", UNUSUAL)
@pytest.mark.parametrize(
    "made", [lambda: plain(0.5, FLOAT, "mul 0"), lambda: block(FLOAT, "add 0")]
)
def test_leaves_strided_tensors_to_python(what: str, made: Callable[[], Given]) -> None:
    given = made()
    unusual = UNUSUAL[what](given)
    assert needs_python(unusual.by_operator)
    assert torch.equal(unusual.by_operator(), given.by_operator())


def test_leaves_operands_of_another_shape_to_python() -> None:
    given = plain((2, 4), FLOAT, "add 0")
    given.extras = [given.extras[0][0]]
    assert needs_python(given.by_operator)
    assert torch.equal(given.by_operator(), given.by_python())


def cut(tensor: Tensor) -> Tensor:
    """Of the same shape, but the memory of the last number is gone."""
    cut = tensor.clone()
    storage = cut.untyped_storage()
    storage.resize_(storage.nbytes() - cut.element_size())
    return cut


def freed(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    copy.untyped_storage().resize_(0)
    return copy


def at(place: int, change: Callable[[Tensor], Tensor]) -> Callable[[Given], Given]:
    """Another tensor in place of a packed one."""

    def changed(given: Given) -> Given:
        packed = list(given.packed)
        packed[place] = change(packed[place])
        return replace(given, packed=packed)

    return changed


BROKEN: dict[str, Callable[[Given], Given]] = {
    "x of another type": lambda g: replace(g, x=g.x.double()),
    "x of another width": lambda g: replace(g, x=g.x[:, :-8].contiguous()),
    "x without a size": lambda g: replace(g, x=g.x[0, 0]),
    "x cut": lambda g: replace(g, x=cut(g.x)),
    "x freed": lambda g: replace(g, x=freed(g.x)),
    "more features": lambda g: replace(g, features=g.features + 8),
    "negative features": lambda g: replace(g, features=-g.features),
    "unknown handle": lambda g: replace(g, handle=g.handle + "0"),
    "no handle": lambda g: replace(g, handle="../" + g.handle),
    "no bias": lambda g: replace(g, bias=None),
    "a shorter bias": lambda g: replace(g, bias=None if g.bias is None else g.bias[1:]),
    "bias of another type": lambda g: replace(g, bias=None if g.bias is None else g.bias.double()),
    "bias freed": lambda g: replace(g, bias=None if g.bias is None else freed(g.bias)),
    "no extras": lambda g: replace(g, extras=[]),
    "an extra too many": lambda g: replace(g, extras=[*g.extras, g.extras[0]]),
    "an extra of another type": lambda g: replace(g, extras=[g.extras[0].double()]),
    "an extra that does not fit": lambda g: replace(g, extras=[g.extras[0][:, 1:].contiguous()]),
    "an extra freed": lambda g: replace(g, extras=[freed(g.extras[0])]),
    "values of another type": at(0, lambda t: t.double()),
    "values cut": at(0, cut),
    "values freed": at(0, freed),
    "keys of another type": at(1, lambda t: t.long()),
    "fewer keys": at(1, lambda t: t[1:]),
    "keys cut": at(1, cut),
    "a shorter row_ptr": at(-1, lambda t: t[1:]),
    "row_ptr of another type": at(-1, lambda t: t.long()),
    "row_ptr freed": at(-1, freed),
}


def error(run: Callable[[], Tensor]) -> tuple[type[BaseException], str]:
    with pytest.raises(MISTAKES) as caught:
        run()
    return type(caught.value), str(caught.value)


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize(
    "made",
    [lambda: plain(0.5, FLOAT, "mul 0"), lambda: block(FLOAT, "add 0")],
    ids=["plain", "block"],
)
def test_mistakes_are_those_that_python_tells(what: str, made: Callable[[], Given]) -> None:
    given = made()
    given.by_operator()
    broken = BROKEN[what](given)
    assert error(broken.by_operator) == error(broken.by_python)


@pytest.mark.parametrize("what", ["scales of another type", "fewer scales", "fewer values"])
def test_mistakes_of_codes(what: str) -> None:
    change = {
        "scales of another type": at(-1, lambda t: t.double()),
        "fewer scales": at(-1, lambda t: t[:, 1:].contiguous()),
        "fewer values": at(0, lambda t: t.flatten()[1:]),
    }
    broken = change[what](quantised("int8", 2, FLOAT, 16))
    assert error(broken.by_operator) == error(broken.by_python)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("kind", ["2:4", "bitmap", "block"])
def test_weights_that_change_are_read_anew(half: Callable[[Given], Tensor], kind: str) -> None:
    given = KINDS[kind]()
    want = half(given)
    values = given.packed[0]
    values.mul_(2)
    assert torch.equal(half(given), want * 2)
    values.data = values.data * 2
    assert torch.equal(half(given), want * 4)
    values.set_((values * 2).contiguous())  # type: ignore[call-overload]
    assert torch.equal(half(given), want * 8)
    for _ in range(20):  # new tensors where others were freed
        given.packed = [given.packed[0].clone() * 1, *(each.clone() for each in given.packed[1:])]
        assert torch.equal(half(given), want * 8)


def test_several_threads_at_once() -> None:
    """Each with weights of its own, some by kernels that nobody has called yet."""
    made = [plain((2, 4), FLOAT, f"scale {number}.25") for number in range(4)]
    made += [block(), plain(0.5)]
    wrong: list[int] = []
    start = threading.Barrier(len(made))

    def work(place: int) -> None:
        given = made[place]
        start.wait()
        got = [given.by_operator() for _ in range(200)]
        want = given.by_python()
        if not all(torch.equal(each, want) for each in got):
            wrong.append(place)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(made))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("kind", ["2:4", "block"])
def test_modes_of_torch(kind: str) -> None:
    given = KINDS[kind]()
    want = given.by_python()
    with torch.inference_mode():
        assert torch.equal(given.by_operator(), want) and given.by_operator().is_inference()
        copies = replace(given, x=given.x.clone(), packed=[each.clone() for each in given.packed])
        assert torch.equal(copies.by_operator(), want) and not needs_python(copies.by_operator)
    with torch.no_grad():
        assert not needs_python(given.by_operator)
    asked = replace(given, x=given.x.clone().requires_grad_())
    assert torch.equal(asked.by_operator(), want)
    functional = torch.func.functionalize(lambda x: replace(given, x=x).by_operator() + 1)
    assert torch.equal(functional(given.x), want + 1)
    meta = replace(given, x=given.x.to("meta")).by_operator()
    assert meta.shape == want.shape and meta.device.type == "meta"


@pytest.mark.parametrize("kind", ["2:4", "two extras", "block"])
def test_inside_a_compiled_graph(kind: str) -> None:
    """One graph for all numbers of rows, whose calls need no Python."""
    torch._dynamo.reset()
    given = KINDS[kind]()

    def forward(x: Tensor, extras: list[Tensor]) -> Tensor:
        return replace(given, x=x * 2, extras=extras).by_operator() + 1

    fast = torch.compile(forward, fullgraph=True, dynamic=True)
    for rows in (3, 2, 3):
        x, extras = given.x[:rows], [each[:rows] for each in given.extras]
        want = replace(given, x=x * 2, extras=extras).by_python() + 1
        torch.testing.assert_close(fast(x, extras), want)
    assert not needs_python(lambda: fast(given.x, given.extras))
    torch.library.opcheck(
        torch.ops.sparsefx_cpp.linear.default,
        (given.x, given.packed, given.bias, given.extras, given.handle, given.features),
    )


_CHILD = """
import shutil, sys
import torch
from pathlib import Path
from sparsefx.codegen.cpp.call import load
from tests.cpp_halves import Given, needs_python
first, second, later, cache = sys.argv[1:]
keep = torch.tensor([[9], [6]], dtype=torch.uint8)
given = Given(torch.ones(4), [torch.ones(4), keep], None, [], first, 2)
print(given.by_operator().tolist(), needs_python(given.by_operator))
shutil.copytree(later, cache, dirs_exist_ok=True)
load(second)
print(given.by_operator().tolist(), needs_python(given.by_operator))
"""


def _copy(handle: str, folder: Path) -> None:
    found = build.library(handle)
    assert found is not None
    folder.mkdir(exist_ok=True, parents=True)
    for suffix in (".so", ".sha256"):
        shutil.copy(found.with_suffix(suffix), folder)


@pytest.mark.parametrize("is_built", [True, False], ids=["built", "not built"])
def test_a_process_that_only_runs(is_built: bool, tmp_path: Path) -> None:
    """It has no compiler and knows handles alone, as one that loads a compiled model.

    The C++ half that another process builds meanwhile is found with the next kernel.
    """
    first, second = (
        test_cpp_kernels.Case((2, 4), FLOAT, 2, 4, "portable", epilogue=epilogue).lowering.handle
        for epilogue in ("", "relu")
    )
    cache, later = tmp_path / "cache" / "cpp", tmp_path / "later"
    for handle in (first, second):
        _copy(handle, cache)
    _copy(build.for_torch("linear_operator", operator._source()), cache if is_built else later)
    later.mkdir(exist_ok=True)
    root = Path(__file__).parent.parent
    places = {"SPARSEFX_CACHE": str(cache.parent), "TMPDIR": str(tmp_path), "PATH": "/nowhere"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", _CHILD, first, second, str(later), str(cache)],
        env={**os.environ, "PYTHONPATH": str(root), **places},
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout.splitlines() == [f"[2.0, 2.0] {not is_built}", "[2.0, 2.0] False"]


def test_what_does_not_compile_warns_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(kernel: str, *_: object) -> NoReturn:
        raise KernelBuildFailed(kernel=kernel, rule="no header torch/library.h")

    monkeypatch.setenv("SPARSEFX_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_private_folder", lambda: tmp_path)
    monkeypatch.setattr(build, "_compile", fail)
    other = operator.Operator()
    with pytest.warns(operator.SlowCalls, match=r"microseconds.*no header torch/library.h"):
        other.ready()
    other.ready()
    other.add("some_kernel", ctypes.CDLL(None))


def test_what_does_not_load_is_built_again_then_warns_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole library, but made where there were other system libraries."""
    built: list[str] = []

    def compiled(kernel: str, *_: object) -> bytes:
        built.append(kernel)
        return b"no library"

    monkeypatch.setenv("SPARSEFX_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_compile", compiled)
    build.build_for_torch("linear_operator", operator._source())
    other = operator.Operator()
    other.add("some_kernel", ctypes.CDLL(None))
    assert built == ["linear_operator"], "a process that only runs builds nothing, and is silent"
    with pytest.warns(operator.SlowCalls, match="invalid ELF header|file too short"):
        other.ready()
    assert built == ["linear_operator"] * 2
    other.ready()
    other.add("some_kernel", ctypes.CDLL(None))
