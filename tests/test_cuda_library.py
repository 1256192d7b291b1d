"""2:4 by cuSPARSELt and CUTLASS: what they refuse, what is packed, what a GPU computes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsefx
from sparsefx import NM, Recipe, epilogue
from sparsefx.codegen.cuda_library import LIBRARY_KERNELS, kernels
from sparsefx.formats import pack_nm
from sparsefx.spec import Pattern
from sparsefx.target import LinearSpec

SPEC = LinearSpec(
    "nm", 128, 256, 2, 4, 0.5, torch.bfloat16, has_bias=True, epilogue="", rows=16, rows_vary=False
)
CUSPARSELT, CUTLASS = LIBRARY_KERNELS
NO_CUDA = torch.version.cuda is None


def weight(pattern: Pattern, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(128, 256, generator=generator)
    return (dense * pattern.keep(dense.abs())).to(dtype)


REFUSED = {
    "at most 2 of 4": {"m": 8, "n": 4},
    "not int8": {"values": "int8"},
    "float16 and bfloat16": {"dtype": torch.float32},
    "sizes are not multiples": {"out_features": 120},
    "17 rows are not a multiple of 8": {"rows": 17},
}


@pytest.mark.parametrize("kernel", LIBRARY_KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("reason", REFUSED)
def test_misfits_are_refused(kernel: kernels.LibraryLinear, reason: str) -> None:
    refusal = kernel.accepts(replace(SPEC, **REFUSED[reason]))  # type: ignore[arg-type]
    assert refusal is not None and reason in refusal


def place(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, cslt: bool) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: cslt)


@pytest.mark.parametrize(
    ("capability", "cslt", "first", "second"),
    [
        (None, True, "no CUDA device", "no CUDA device"),
        ((7, 5), True, "7.5 has no sparse tensor cores", "7.5 has no sparse tensor cores"),
        ((9, 0), True, None, "for compute capability 8.x"),
        ((8, 0), False, "no cuSPARSELt", None),
        ((8, 6), True, None, None),
    ],
)
def test_what_the_machine_lacks_is_the_reason(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int] | None,
    cslt: bool,
    first: str | None,
    second: str | None,
) -> None:
    place(monkeypatch, capability, cslt)
    for kernel, reason in ((CUSPARSELT, first), (CUTLASS, second)):
        refusal = kernel.accepts(SPEC)
        assert (refusal is None) if reason is None else (reason in str(refusal))


@pytest.mark.skipif(not NO_CUDA, reason="this torch has CUDA")
def test_a_torch_without_cuda_is_the_reason() -> None:
    assert CUSPARSELT.accepts(SPEC) == "this torch is built without CUDA"


@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(2, 8)], ids=str)
@pytest.mark.parametrize("text", ["", "silu;add 0", "gate_silu"])
def test_what_is_packed_for_cutlass_is_the_weight(pattern: NM, text: str) -> None:
    dense = weight(pattern)
    spec = replace(SPEC, n=pattern.n, m=pattern.m, epilogue=text)
    made = CUTLASS.lower(spec, tuple(pack_nm(dense, pattern.n, pattern.m)))
    assert sum(tensor.nbytes for tensor in made.packed) == dense.nbytes * 9 // 16
    assert made.multiple == 8
    x, bias = torch.randn(2, 8, 256).bfloat16(), torch.randn(128).bfloat16()
    extras = [torch.randn(2, 8, epilogue.features(128, text)).bfloat16()] * text.count("add")
    expected = epilogue.apply(F.linear(x, dense, bias), text, extras)
    torch.testing.assert_close(made.run(x, bias, extras), expected)


def test_the_fake_result_is_the_real_one() -> None:
    made = CUTLASS.lower(SPEC, tuple(pack_nm(weight(NM(2, 4)), 2, 4)))
    x, bias = torch.randn(2, 8, 256).bfloat16(), torch.randn(128).bfloat16()
    arguments = (x, list(made.packed), bias, [], made.handle, made.features)
    torch.library.opcheck(made.op, arguments)


def test_the_search_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEFX_CACHE", str(tmp_path))
    asked: list[tuple[int, ...]] = []

    def search(compressed: Tensor, x: Tensor, **_: object) -> int:
        asked.append(tuple(x.shape))
        return 3

    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", search)
    for _ in range(2):
        assert kernels._algorithm(replace(SPEC, rows=21), torch.zeros(1)) == 3
    assert asked == [(256, 16)], "rows are rounded to what the library takes"


@pytest.mark.cuda
@pytest.mark.parametrize("kernel", LIBRARY_KERNELS, ids=lambda kernel: kernel.name)
@torch.no_grad()
def test_on_a_gpu_it_computes_the_product(kernel: kernels.LibraryLinear) -> None:
    if reason := kernel.accepts(SPEC):
        pytest.skip(reason)
    dense = weight(NM(2, 4)).cuda()
    made = kernel.lower(SPEC, tuple(pack_nm(dense, 2, 4)))
    x, bias = torch.randn(64, 256).bfloat16().cuda(), torch.randn(128).bfloat16().cuda()
    result = made.run(x, bias)
    assert result.is_contiguous()
    torch.testing.assert_close(result, F.linear(x, dense, bias), rtol=2e-2, atol=2e-2)


@pytest.mark.cuda
@torch.no_grad()
def test_a_cuda_graph_captures_a_compiled_model() -> None:
    """No body of an operator waits for the GPU or takes memory from the host meanwhile."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layers = (nn.Linear(256, 512), nn.SiLU(), nn.Linear(512, 256))
    model = sparsefx.sparsify(
        nn.Sequential(*layers).bfloat16().cuda(), Recipe({"*": NM(2, 4)}), progress=False
    )
    fast = sparsefx.compile(model, guard="off", dynamic=True)
    x = torch.randn(16, 256, dtype=torch.bfloat16, device="cuda")
    expected = model(x)
    fast(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = fast(x)
    graph.replay()
    torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)
