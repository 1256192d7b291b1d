"""Weights as codes: sparsify rounds them, compile finds them again, and no number changes there."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import sparsefx
from sparsefx.annotations import annotations
from sparsefx.detect import tightest
from sparsefx.errors import UnknownOption
from sparsefx.graph import capture
from sparsefx.packing import Packing
from sparsefx.passes.detect import Detect
from sparsefx.passes.insert_masks import InsertMasks
from sparsefx.passes.lower import Lower
from sparsefx.passes.pack_bitmap import PackBitmap
from sparsefx.passes.pack_block import PackBlock
from sparsefx.passes.pack_nm import PackNM
from sparsefx.patterns import Columns, Rows
from sparsefx.prune.rounding import Grid
from sparsefx.prune.solve import solve
from sparsefx.quantise import rounded, scales_of
from sparsefx.recover import recovered_scales
from sparsefx.report import Report
from sparsefx.spec import NM, Block, Pattern, Recipe, Unstructured
from sparsefx.target import LinearSpec
from sparsefx.values import with_values
from tests.compilers import accept
from tests.layer_inputs import correlated, observed, squared_errors, weight_of
from tests.pass_models import Around, after, assert_same_numbers, x_of
from tests.plain_target import PlainNM, plain

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KINDS = ["int8", "int4", "fp8"]
PATTERNS: list[Pattern] = [
    NM(2, 4),
    NM(1, 8),
    Unstructured(0.6),
    Block(1, 16, 0.5),
    Block(16, 16, 0.5),
    Rows(0.5),
    Columns(0.5),
]


def coded(pattern: Pattern, kind: str) -> Pattern:
    return replace(pattern, values=kind, group=0 if isinstance(pattern, Block) else 32)


def pruned(pattern: Pattern, dtype: torch.dtype, width: int = 128) -> nn.Linear:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 64, dtype=dtype))
    sparse = sparsefx.sparsify(model, Recipe({"*": pattern}), progress=False)
    assert annotations(sparse) == {"0.weight": pattern}
    linear = sparse[0]
    assert isinstance(linear, nn.Linear)
    return linear


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_what_sparsify_rounds_is_found_in_the_weight(
    pattern: Pattern, kind: str, dtype: torch.dtype
) -> None:
    asked = coded(pattern, kind)
    weight = pruned(asked, dtype).weight.detach()
    plain_weight = pruned(pattern, dtype).weight.detach()
    assert torch.equal(weight, rounded(plain_weight, kind, asked.tile(128))), "the same mask"
    found = with_values(tightest(weight), weight, asked).pattern
    assert found is not None and found.values == kind
    packing = Packing.of(found)
    assert torch.equal(packing.unpack(packing.pack(weight), 128), weight)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_that_were_asked_for_need_no_zeros(kind: str) -> None:
    asked = Unstructured(0, values=kind)
    weight = pruned(asked, torch.float32).weight.detach()
    found = with_values(tightest(weight), weight, asked)
    assert found.pattern is not None and not found.reason
    packing = Packing.of(found.pattern)
    assert (packing.layout, packing.values) == ("bitmap", kind)
    assert torch.equal(packing.unpack(packing.pack(weight), weight.shape[1]), weight)
    unasked = with_values(tightest(weight), weight)
    assert unasked.pattern is None and "needs at least 25 %" in unasked.reason


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.6), Block(1, 16, 0.6)], ids=str)
def test_no_hint_is_needed_where_the_group_is_a_usual_one(pattern: Pattern, kind: str) -> None:
    asked = replace(pattern, values=kind)
    weight = pruned(asked, torch.bfloat16).weight.detach()
    found = with_values(tightest(weight), weight).pattern
    assert found is not None and type(found) is type(pattern)
    # Large e4m3 numbers are multiples of 8: without the small ones they are int8 codes as well.
    assert found.values in {"fp8": ("fp8", "int8")}.get(kind, (kind,))
    ordinary = pruned(pattern, torch.bfloat16).weight.detach()
    assert with_values(tightest(ordinary), ordinary, asked).pattern == tightest(ordinary).pattern


def test_codes_that_are_zero_leave_the_pattern_that_was_decided() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 64)
    weight[:, 0] = 40  # so that most others round to 0
    asked = NM(2, 4, values="int4", group=0)
    weight = rounded(weight.masked_fill(~asked.keep(weight.abs()), 0), "int4", (1, 64))
    assert isinstance(tightest(weight).pattern, Unstructured)
    assert with_values(tightest(weight), weight, asked).pattern == asked


def test_dynamic_values_are_confirmed_and_never_guessed() -> None:
    asked = NM(2, 4, values="int8_dynamic")
    weight = pruned(asked, torch.float32).weight.detach()
    assert with_values(tightest(weight), weight, asked).pattern == asked
    assert str(with_values(tightest(weight), weight).pattern) == "2:4 int8"
    weight[0, 0] += 1e-3
    assert with_values(tightest(weight), weight, asked).pattern == tightest(weight).pattern


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("pattern", "criterion"),
    [
        (NM(2, 4), "SparseGPT"),
        (NM(2, 4), "DSnoT"),
        (Unstructured(0.5), "SparseGPT"),
        (Unstructured(0.5), "Reconstruct"),
        (Block(1, 16, 0.5), "SparseGPT"),
    ],
    ids=str,
)
def test_later_columns_make_up_for_rounding(pattern: Pattern, kind: str, criterion: str) -> None:
    start = sparsefx.SparseGPT()
    by_data = {
        "SparseGPT": start,
        "DSnoT": sparsefx.DSnoT(start),
        "Reconstruct": sparsefx.Reconstruct(start),
    }[criterion]
    asked = replace(coded(pattern, kind), criterion=by_data)
    x, weight = correlated(600, 96), weight_of(48, 96).to(torch.bfloat16)
    statistics = observed(x)
    solved = solve(weight, asked, statistics)
    free = solve(weight, replace(asked, values="", group=0), statistics)
    nearest = rounded(free.weight.to(weight.dtype), kind, asked.tile(96)).float()
    assert torch.equal(solved.keep, free.keep)
    ours, theirs = (squared_errors(x, weight, w).sum() for w in (solved.weight, nearest))
    assert ours < theirs * {"int4": 0.98, "fp8": 1, "int8": 1.001}[kind]  # of int8 hardly a thing
    stored = solved.weight.to(weight.dtype)
    assert torch.equal(stored.float(), solved.weight), "numbers of the weight's own type"
    assert not stored[~solved.keep].any()
    assert recovered_scales(stored, kind, asked.tile(96)) is not None


def test_int4_scales_of_a_solver_leave_the_least_error() -> None:
    weight, tile = weight_of(16, 128).to(torch.float16), (1, 64)
    weight[0, :64] = 0
    whole = Grid(scales_of(weight, "int4", tile), "int4", tile)
    fitted = Grid.fitted(weight, "int4", tile)
    assert (fitted.errors(weight) <= whole.errors(weight)).all()
    assert fitted.errors(weight).sum() < 0.9 * whole.errors(weight).sum()
    assert fitted.scales[0, 0] == 0
    assert torch.equal(Grid.fitted(weight, "int8", tile).scales, scales_of(weight, "int8", tile))


@pytest.mark.parametrize("pattern", [coded(p, "int4") for p in PATTERNS[:5]], ids=str)
def test_passes_pack_codes_and_the_numbers_stay(pattern: Pattern) -> None:
    model = Around(lambda s, x: s.l(x), l=pruned(pattern, torch.float64))
    hints = Detect(patterns={"l.weight": pattern})
    passes = (hints, InsertMasks(), PackNM(), PackBlock(), PackBitmap())
    gm, ctx, _ = after(model, passes, x_of(3, 128))
    (node,) = (n for n in gm.graph.nodes if "sparsefx_packing" in n.meta)
    assert node.kwargs["kind"] == "int4"
    row = next(iter(ctx.rows.values()))
    assert row.pattern.endswith("int4" if isinstance(pattern, Block) else "int4/32")
    assert_same_numbers(gm, model, x_of(3, 128))


class Choosy(PlainNM):
    """Takes only values of the input's own type."""

    def accepts(self, spec: LinearSpec) -> str | None:
        return f"no {spec.values}" if spec.values else None


@pytest.mark.parametrize("has_coded_kernel", [True, False])
def test_a_float_kernel_gets_what_no_other_takes(has_coded_kernel: bool) -> None:
    pattern = NM(2, 4, values="int4", group=32)
    model = Around(lambda s, x: s.l(x), l=pruned(pattern, torch.float64))
    floats = Choosy("floats")
    kernels = (PlainNM("codes"), floats) if has_coded_kernel else (floats,)
    passes = (Detect(), InsertMasks(), PackNM(), Lower(plain(*kernels), accept))
    gm, ctx, _ = after(model, passes, x_of(3, 128))
    row = next(iter(ctx.rows.values()))
    assert (row.kernel, row.pattern) == ("codes" if has_coded_kernel else "floats", "2:4 int4/32")
    dense = 64 * 128
    sizes = {True: dense // 4 + dense // 8 + 64 * 4 * 8, False: dense // 2 * 8 + dense // 8}
    assert row.stored_bytes == sizes[has_coded_kernel]
    reason = "" if has_coded_kernel else "2:4 weights with plain values here; floats: no int4"
    assert row.reason == reason
    assert ("[1] 1 x 2:4 weights" in str(Report("m", [row]))) == bool(reason)
    assert_same_numbers(gm, model, x_of(3, 128))


def test_compiling_a_sparsified_model_changes_no_number() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 128))
    recipe = Recipe({"0.*": NM(2, 4, values="int4"), "2.*": Unstructured(0.7, values="int8")})
    sparse = sparsefx.sparsify(model, recipe, progress=False)
    fast = sparsefx.compile(sparse, guard="off")
    x = torch.randn(4, 128)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), sparse(x))
    patterns = [row.pattern for row in sparsefx.explain(fast).rows]
    assert patterns[0] == "2:4 int4"
    assert patterns[1].endswith("int8")


def test_the_named_backend_takes_annotations() -> None:
    recipe = Recipe({"*": NM(2, 4, values="int8_dynamic")})
    model = sparsefx.sparsify(nn.Sequential(nn.Linear(128, 64)), recipe, progress=False)
    options = {"annotations": annotations(model), "guard": "off"}
    fast = torch.compile(model, backend="sparsefx", options=options)
    with torch.no_grad():
        fast(torch.randn(2, 128))
    assert [row.pattern for row in sparsefx.explain(fast).rows] == ["2:4 int8_dynamic"]
    with pytest.raises(UnknownOption, match="annotations='2:4' is not a choice"):
        sparsefx.backend(
            capture(model, (torch.zeros(1, 128),)), [], options={"annotations": {"a": "2:4"}}
        )
