"""The attention kernels compile for real GPUs without spilling; a skipped tile really is jumped."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from sparsefx.codegen.triton.attention.prefill import form_for
from sparsefx.codegen.triton.attention.variant import AttentionVariant
from tests.aot_client import Worker

MATRIX = {"sm_80": "mma", "sm_89": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
SHARED = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB a program
SAMPLED = [
    ("skip_prefill", 128, "128x64", "sm_90"),
    ("skip_prefill", 64, "64x64", "sm_80"),
    ("block", 128, "128x64", "sm_90"),
    ("block", 64, "64x64", "gfx942"),
]
COMBINATIONS = [
    (kernel, dim, tile, arch)
    for kernel in ("skip_prefill", "block")
    for dim in (64, 128)
    for tile in ("128x64", "64x64")
    for arch in MATRIX
]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """One process for all tests, with cache folders of its own."""
    folder: Path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARSEFX_CACHE", str(folder))
        patch.setenv("TRITON_CACHE_DIR", str(folder / "compiled"))
        with Worker() as started:
            yield started


def score_products(handle: str, arch: str) -> int:
    """Matrix instructions that one warp issues for Q K^T of a tile, in each of three loops."""
    variant = AttentionVariant.parse(handle)
    (rows, keys), warps = variant.tile, form_for(variant, int(arch[3:])).warps
    # mma.sync m16n8k16 is of one warp, wgmma m64nNk16 of four
    one = 64 * keys * 16 / 4 if arch == "sm_90" else 16 * 8 * 16
    return round(3 * rows * keys * variant.head_dim / one / warps)


def check(worker: Worker, kernel: str, dim: int, tile: str, arch: str, mask: str = "none") -> None:
    """Compiles; asserts resources, matrix instructions, and the branch in PTX."""
    order = " order=sink_diagonal" * (kernel == "skip_prefill")
    handle = f"{kernel} bfloat16 dim {dim} group 4 tile {tile} mask {mask} causal{order}"
    found = worker.compile_attention(handle, arch)
    assert found["spills"] == 0 and found["stack"] == 0, found
    assert int(str(found["shared"])) <= 1024 * SHARED[arch], found
    counts, looped, avoidable = (found[name] for name in ("instructions", "looped", "avoidable"))
    assert isinstance(counts, dict) and isinstance(looped, dict) and isinstance(avoidable, dict)
    assert "local" not in counts and counts[MATRIX[arch]] > 0
    if arch == "gfx942":
        return
    if kernel == "skip_prefill":
        # exp, V loads and products P V only behind the branch; Q K^T and K's copies never
        assert looped["exp2"] == avoidable["exp2"] > 0, found
        # one thread issues tcgen05: those of Q K^T too lie behind a branch, that of the thread
        if arch != "sm_100":
            always = looped[MATRIX[arch]] - avoidable[MATRIX[arch]]
            assert always == score_products(handle, arch), found
        if mask == "none":
            assert looped["load"] == avoidable["load"] > 0, found
        assert looped["cp_async"] > 0 and "cp_async" not in avoidable, found
    else:  # no branch: V is copied ahead like K
        assert "exp2" not in avoidable and looped["cp_async"] > 0, found


@pytest.mark.parametrize(("kernel", "dim", "tile", "arch"), SAMPLED)
def test_default_tiles(worker: Worker, kernel: str, dim: int, tile: str, arch: str) -> None:
    check(worker, kernel, dim, tile, arch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "dim", "tile", "arch"), [each for each in COMBINATIONS if each not in SAMPLED]
)
def test_all_default_tiles(worker: Worker, kernel: str, dim: int, tile: str, arch: str) -> None:
    check(worker, kernel, dim, tile, arch)


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["bool", "float"])
def test_masks(worker: Worker, mask: str) -> None:
    check(worker, "skip_prefill", 128, "128x64", "sm_90", mask)


@pytest.mark.slow
@pytest.mark.parametrize("arch", MATRIX)
@pytest.mark.parametrize(
    "handle",
    [
        "skip_prefill float32 dim 64 group 1 tile 64x64 mask none causal order=ascending",
        "skip_prefill float16 dim 80 group 1 tile 64x64 mask bool windowed order=ascending",
        "block float32 dim 64 group 1 tile 64x64 mask none",
    ],
)
def test_other_variants_compile_within_the_device(worker: Worker, handle: str, arch: str) -> None:
    found = worker.compile_attention(handle, arch)
    assert int(str(found["shared"])) <= 1024 * SHARED[arch], found


def test_a_kernel_that_is_not_launched_gets_an_answer(worker: Worker) -> None:
    line = (
        '{"handle": "block float32 dim 64 group 1 tile 64x64 mask none", "arch": "sm_90", '
        '"batch": 1, "queries": 64, "keys": 64, "kernel": "other"}'
    )
    answer = worker.ask(line)
    assert not answer["ok"] and str(answer["error"]).startswith("UnknownOption")
