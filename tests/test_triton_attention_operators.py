"""Handles, text, operators and refusals of the Triton attention kernels with many queries."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from sparsefx.attention import meaning
from sparsefx.attention.route import BeyondCalibration
from sparsefx.codegen.triton import ptx
from sparsefx.codegen.triton.attention import launch
from sparsefx.codegen.triton.attention.kernels import (
    PREFILL_KERNELS,
    TritonBlock,
    TritonSkipPrefill,
)
from sparsefx.codegen.triton.attention.variant import AttentionVariant
from sparsefx.errors import DtypeMismatch, InvalidHandle, ShapeMismatch
from sparsefx.target import AttentionLowering
from tests.attention_cases import Sizes
from tests.interp_reduce import fast
from tests.triton_attention_cases import Case

CASE = Case(Sizes(batch=1, heads=2, kv_heads=1, queries=20, keys=20, dim=16))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEFX_CACHE", str(tmp_path))
    launch.load.cache_clear()


def lowered(case: Case = CASE) -> AttentionLowering:
    return TritonSkipPrefill().lower(case.spec("skip_softmax"))


def arguments(
    case: Case, dense_below: int = 0, calibrated: int = 0, handle: str = ""
) -> tuple[object, ...]:
    """What the operator skip_softmax_prefill takes."""
    factors = case.factors()
    seen = (case.is_causal, case.scale, case.window, *case.tile, case.order)
    handle = handle or lowered(case).handle
    return (*case.operands(), factors, factors, *seen, dense_below, calibrated, handle)


def test_the_operator_runs_the_kernel() -> None:
    op, given = lowered().op, arguments(CASE)
    with fast():
        result = op(*given)
    keep = CASE.kept(given[0], given[1], None)  # type: ignore[arg-type]
    CASE.check(result, *given[:4], keep)  # type: ignore[arg-type]


def test_the_fake_result_has_the_layout_of_the_real_one() -> None:
    op, given = lowered().op, arguments(CASE)
    with fast():
        real = op(*given)
    dense = op(*given[:-3], 1000, *given[-2:])
    with FakeTensorMode() as mode:
        wrapped = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in given]
        fake = op(*wrapped)
    assert fake.shape == real.shape and fake.dtype == real.dtype
    assert fake.stride() == real.stride() == dense.stride()


def test_a_short_call_is_dense_and_a_long_one_warns() -> None:
    op = lowered().op
    q, k, v, _ = CASE.operands()
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=CASE.scale, enable_gqa=True
    )
    assert torch.equal(op(*arguments(CASE, dense_below=21)), dense)
    with fast(), pytest.warns(BeyondCalibration, match="19 of its calibration"):
        op(*arguments(CASE, calibrated=19))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_the_kernel_does_not_run_is_the_meaning(dtype: torch.dtype) -> None:
    """One query; and bfloat16 on CPU, which Triton's interpreter gets wrong."""
    queries = 1 if dtype == torch.float32 else 20
    case = replace(CASE, sizes=replace(CASE.sizes, queries=queries), dtype=dtype)
    given = arguments(case)
    expected = meaning.skip_softmax_attention(*given[:-3])  # type: ignore[arg-type]
    assert torch.equal(lowered(case).op(*given), expected)


def test_the_block_operator() -> None:
    lowering = TritonBlock().lower(CASE.spec("block"))
    q, k, v, _ = CASE.operands()
    keep = torch.tensor([[[[True, True], [False, True]]]])
    seen = (True, CASE.scale, 0, *CASE.tile, 0, 0, lowering.handle)
    with fast():
        CASE.check(lowering.op(q, k, v, None, keep, *seen), q, k, v, None, keep)
    with pytest.raises(ShapeMismatch, match="keep"):
        lowering.op(q, k, v, None, keep[..., :1], *seen)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"dtype": torch.float16}, DtypeMismatch),
        ({"sizes": replace(CASE.sizes, dim=32)}, ShapeMismatch),
        ({"sizes": replace(CASE.sizes, kv_heads=2)}, ShapeMismatch),
        ({"tile": (32, 16)}, InvalidHandle),
        ({"order": "ascending"}, InvalidHandle),
        ({"mask": "bool"}, InvalidHandle),
        ({"is_causal": False}, InvalidHandle),
        ({"window": 3}, InvalidHandle),
    ],
)
def test_a_call_of_another_kind_is_refused(
    change: dict[str, object], error: type[Exception]
) -> None:
    other = replace(CASE, **change)  # type: ignore[arg-type]
    with pytest.raises(error):
        lowered().op(*arguments(other, handle=lowered().handle))


@pytest.mark.parametrize(
    "change",
    [{}, {"mask": "float", "window": 7}, {"is_causal": False, "dtype": torch.bfloat16}],
)
def test_a_handle_says_everything(change: dict[str, object]) -> None:
    spec = replace(CASE, **change).spec("skip_softmax")  # type: ignore[arg-type]
    variant = AttentionVariant.of("skip_prefill", spec, order="ascending")
    assert AttentionVariant.parse(variant.handle) == variant


HEAD = "skip_prefill float32 dim 16 group 1 tile 16x16 mask none"


@pytest.mark.parametrize(
    "handle",
    [
        "",
        "nm 2:4 float32 linear",
        HEAD.replace("float32", "int8"),
        HEAD.replace("none", "some"),
        HEAD.replace("skip_prefill", "nothing"),
        HEAD.replace("skip_prefill", "../skip_prefill"),
        f"{HEAD} colour=red",
        f"{HEAD} order=7",
        f"{HEAD} defer=yes",
        f"{HEAD} order=1)+print(",
    ],
)
def test_a_forged_handle_is_refused(handle: str) -> None:
    with pytest.raises(InvalidHandle):
        launch.load(handle)


def test_the_generated_text_stands_alone() -> None:
    text = lowered().text
    assert text.startswith("# generated by sparsefx from: skip_prefill float32 dim 16 group 2")
    imported = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert {ast.unparse(each) for each in imported} == {
        "import triton",
        "import triton.language as tl",
    }
    assert Path(lowered().path).read_text() == text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"phase": "decode"}, "not skip_softmax decode"),
        ({"dtype": torch.float64}, "not torch.float64"),
        ({"head_dim": 257}, "at most 256"),
        ({"tile": (64, 48)}, "tiles of"),
        ({"order": "random"}, "not an order"),
        ({"heads": 3, "kv_heads": 2}, "not a multiple"),
    ],
)
def test_refusals_have_a_reason(change: dict[str, object], reason: str) -> None:
    spec = replace(CASE.spec("skip_softmax"), **change)  # type: ignore[arg-type]
    refused = TritonSkipPrefill().accepts(spec)
    assert refused is not None and reason in refused


def test_the_tuple_of_kernels() -> None:
    assert [kernel.method for kernel in PREFILL_KERNELS] == ["skip_softmax", "block"]
    assert PREFILL_KERNELS[1].accepts(CASE.spec("block")) is None


def test_ptx_loops() -> None:
    """before; a loop with a jump around `rare`, whose latch stands above its header; after."""
    text = """
    before;
    @%p1 bra $L__out;
    bra.uni $L__head;
$L__latch:
    always2;
    @%p3 bra $L__head;
    bra.uni $L__out;
$L__head:
    always1;
    @%p2 bra $L__latch;
    rare;
    bra.uni $L__latch;
$L__out:
    after;
    ret;
"""
    looped, avoidable = ptx.loops(text)
    assert {"always1;", "always2;", "rare;"} <= {line.strip() for line in looped}
    assert not {"before;", "after;"} & {line.strip() for line in looped}
    assert [line.strip() for line in avoidable] == ["rare;", "bra.uni $L__latch;"]
