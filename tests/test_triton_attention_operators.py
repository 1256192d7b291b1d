"""Handles, text, operators and refusals of the Triton attention kernels with many queries."""

import ast
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from sparsefx.attention import meaning
from sparsefx.attention.operators import SKIP_SOFTMAX
from sparsefx.attention.route import BeyondCalibration
from sparsefx.codegen.triton import ptx
from sparsefx.codegen.triton.attention import launch
from sparsefx.codegen.triton.attention.decode_kernels import TritonSkipDecode
from sparsefx.codegen.triton.attention.kernels import (
    PREFILL_KERNELS,
    TritonBlock,
    TritonSkipPrefill,
)
from sparsefx.codegen.triton.attention.variant import LARGEST_GROUP, AttentionVariant
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


@pytest.mark.parametrize(
    "change",
    [{}, {"mask": "bool", "window": 120}, {"mask": "float", "order": "ascending"}],
)
def test_one_query_goes_to_the_kernels_of_one_query(
    change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = Sizes(batch=2, heads=4, kv_heads=2, queries=1, keys=150, dim=16)
    case = replace(CASE, sizes=sizes, **change)  # type: ignore[arg-type]
    given = list(arguments(case))
    given[4] = torch.full((4,), torch.nan)  # the factors of more queries
    with monkeypatch.context() as patch:
        patch.delattr(meaning, "skip_softmax_attention")
        result = lowered(case).op(*given)
    wide = [
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in given
    ]
    expected = SKIP_SOFTMAX(*wide[:-3])
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=2e-6)
    wide[5] = torch.zeros(4)  # keeps all tiles
    assert (SKIP_SOFTMAX(*wide[:-3]) - expected).abs().max() > 1e-3
    with pytest.raises(ShapeMismatch, match="factor has shape"):
        lowered(case).op(*replaced(given, 5, torch.ones(3)))


CROWD = replace(CASE.sizes, heads=LARGEST_GROUP + 1, queries=1)


@pytest.mark.parametrize("change", [{"sizes": CROWD}, {"dtype": torch.bfloat16}], ids=str)
def test_what_no_kernel_runs_is_the_meaning(change: dict[str, object]) -> None:
    """One query of many heads; and bfloat16 on CPU, which Triton's interpreter gets wrong."""
    case = replace(CASE, **change)  # type: ignore[arg-type]
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


def replaced(given: Sequence[object], index: int, value: object) -> list[object]:
    return [*given[:index], value, *given[index + 1 :]]


# what kernels would read or write beyond its end
MALFORMED = [
    (0, torch.zeros(2, 20, 16), "q has shape"),
    (0, torch.zeros(1, 2, 20, 16), "k has shape"),
    (0, torch.zeros(2, 3, 20, 16), "k has shape"),
    (1, torch.zeros(1, 1, 20, 16), "k has shape"),
    (1, torch.zeros(1, 20, 16), "k has shape"),
    (2, torch.zeros(2, 1, 19, 16), "v has shape"),
    (2, torch.zeros(2, 2, 20, 16), "v has shape"),
    (2, torch.zeros(1, 1, 20, 16), "v has shape"),
    (2, torch.zeros(2, 1, 20, 15), "v has shape"),
    (3, torch.ones(2, 1, 20, 19, dtype=torch.bool), "mask has shape"),
    (3, torch.ones(3, 1, 20, 20, dtype=torch.bool), "mask has shape"),
    (3, torch.ones(1, 2, 1, 20, 20, dtype=torch.bool), "mask has shape"),
]
PAIR = replace(CASE, sizes=replace(CASE.sizes, batch=2), mask="bool")


@pytest.mark.parametrize(("index", "value", "rule"), MALFORMED)
def test_malformed_operands_are_refused(index: int, value: object, rule: str) -> None:
    given = arguments(PAIR)
    with pytest.raises(ShapeMismatch, match=rule):
        lowered(PAIR).op(*replaced(given, index, value))
    single = replace(PAIR, sizes=replace(PAIR.sizes, queries=1))
    decode = TritonSkipDecode().lower(replace(single.spec("skip_softmax"), phase="decode"))
    with pytest.raises(ShapeMismatch, match=rule):
        decode.op(*replaced(arguments(single, handle=decode.handle), index, value))
    block = TritonBlock().lower(PAIR.spec("block"))
    seen = (True, PAIR.scale, 0, *PAIR.tile, 0, 0, block.handle)
    keep = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    with pytest.raises(ShapeMismatch, match=rule):
        block.op(*replaced((*given[:4], keep), index, value), *seen)


@pytest.mark.parametrize("factor", [torch.zeros(3), torch.zeros(1), torch.zeros(1, 2)])
def test_other_factors_are_refused(factor: torch.Tensor) -> None:
    with pytest.raises(ShapeMismatch, match="factor has shape"):
        lowered().op(*replaced(arguments(CASE), 4, factor))


@pytest.mark.parametrize(
    ("keep", "error"),
    [
        (torch.ones(1, 1, 2, 1, dtype=torch.bool), ShapeMismatch),
        (torch.ones(1, 1, 3, 2, dtype=torch.bool), ShapeMismatch),
        (torch.ones(2, 1, 2, 2, dtype=torch.bool), ShapeMismatch),
        (torch.ones(2, 2, dtype=torch.bool), ShapeMismatch),
        (torch.ones(1, 1, 2, 2, dtype=torch.uint8), DtypeMismatch),
    ],
)
def test_other_maps_are_refused(keep: torch.Tensor, error: type[Exception]) -> None:
    block = TritonBlock().lower(CASE.spec("block"))
    seen = (True, CASE.scale, 0, *CASE.tile, 0, 0, block.handle)
    with pytest.raises(error, match="keep"):
        block.op(*CASE.operands(), keep, *seen)


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
