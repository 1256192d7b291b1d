"""Which passes run, in which order, for which exit."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from sparsefx import debug
from sparsefx.attention.wanted import Wanted
from sparsefx.by_rows import NO_COSTS, Costs
from sparsefx.errors import InvalidSetting
from sparsefx.passes.apply_recipe import ApplyRecipe
from sparsefx.passes.detect import Detect
from sparsefx.passes.fold_masks import FoldMasks
from sparsefx.passes.fuse_attention import FuseAttention
from sparsefx.passes.fuse_epilogue import FuseEpilogue
from sparsefx.passes.fuse_gated_mlp import FuseGatedMLP
from sparsefx.passes.insert_masks import InsertMasks
from sparsefx.passes.lower import Baseline, Judge, Lower, no_baseline
from sparsefx.passes.lower_attention import AttentionJudge, LowerAttention
from sparsefx.passes.lower_conv import ConvJudge, LowerConv
from sparsefx.passes.merge_projections import MergeProjections
from sparsefx.passes.pack_bitmap import PackBitmap
from sparsefx.passes.pack_block import PackBlock
from sparsefx.passes.pack_nm import PackNM
from sparsefx.passes.threshold_softmax import ThresholdSoftmax
from sparsefx.pipeline import Pass
from sparsefx.spec import Pattern
from sparsefx.target import Inspect, Target, no_objections

DENSE = Wanted()
_NOTHING: Mapping[str, Pattern] = MappingProxyType({})


@dataclass(frozen=True)
class Judges:
    """Who says whether a kernel wins; `proof`: whether it must (False is guard="off").

    costs: what choosing by rows and unpacking cost; baseline: of quantised weights, for the report;
    inspect: which kernels are not worth judging.
    """

    linear: Judge
    attention: AttentionJudge
    convolution: ConvJudge
    proof: bool
    costs: Costs = NO_COSTS
    baseline: Baseline = no_baseline
    inspect: Inspect = no_objections


def inference(
    target: Target,
    judges: Judges,
    wanted: Wanted = DENSE,
    patterns: Mapping[str, Pattern] = _NOTHING,
) -> tuple[Pass, ...]:
    """For torch.compile without gradients: down to kernels; patterns: as `Detect` takes them."""
    lower = Lower(
        target, judges.linear, judges.proof, judges.costs, judges.baseline, judges.inspect
    )
    return (
        *packing(wanted, patterns),
        *stacking(lower),
        LowerAttention(target, judges.attention, judges.proof),
        LowerConv(target, judges.convolution, judges.proof),
        lower,
    )


def stacking(lower: Lower) -> tuple[Pass, ...]:
    """Fewer calls of larger kernels. Not for export: an ONNX file keeps the layers of the model."""
    return (FuseGatedMLP(lower), MergeProjections(lower))


def packing(
    wanted: Wanted = DENSE, patterns: Mapping[str, Pattern] = _NOTHING, *, onnx: bool = False
) -> tuple[Pass, ...]:
    """Down to packed dialect nodes; onnx: what its export takes, blocks as bitmaps and no codes."""
    return (
        Detect(attention=bool(wanted), patterns=patterns, codes=not onnx),
        *thresholding(wanted),
        InsertMasks(),
        PackNM(),
        *(() if onnx else (PackBlock(),)),
        PackBitmap(),
        FoldMasks(),
        FuseEpilogue(),
    )


def thresholding(wanted: Wanted) -> tuple[Pass, ...]:
    """Attention is left as it is written unless some of it is to be sparse."""
    return (FuseAttention(), ThresholdSoftmax(wanted)) if wanted else ()


def training(trained: frozenset[str], wanted: Wanted = DENSE) -> tuple[Pass, ...]:
    """With gradients: the weights named in `trained` get masks and stay trainable."""
    return (Detect(attention=bool(wanted)), InsertMasks(only=trained))


def check_skipped() -> None:
    """Raises InvalidSetting if SPARSEFX_SKIP names a pass that there is not."""
    attention = (FuseAttention.name, ThresholdSoftmax.name, LowerAttention.name)
    fused = (FuseGatedMLP.name, MergeProjections.name)
    packed = (each.name for each in packing())
    known = (ApplyRecipe.name, *packed, *fused, *attention, LowerConv.name, Lower.name)
    for name in sorted(debug.settings().skip):
        if name not in known:
            raise InvalidSetting(variable="SPARSEFX_SKIP", value=name, known=", ".join(known))
