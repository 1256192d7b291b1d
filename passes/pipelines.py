"""Which passes run, in which order, for which exit."""

from sparsefx import debug
from sparsefx.errors import InvalidSetting
from sparsefx.passes.detect import Detect
from sparsefx.passes.fold_masks import FoldMasks
from sparsefx.passes.fuse_epilogue import FuseEpilogue
from sparsefx.passes.insert_masks import InsertMasks
from sparsefx.passes.lower import Judge, Lower
from sparsefx.passes.pack_bitmap import PackBitmap
from sparsefx.passes.pack_nm import PackNM
from sparsefx.pipeline import Pass
from sparsefx.target import Target


def inference(target: Target, judge: Judge, proof: bool) -> tuple[Pass, ...]:
    """For torch.compile without gradients: down to kernels."""
    return (*packing(), Lower(target, judge, proof))


def packing() -> tuple[Pass, ...]:
    """Down to packed dialect nodes: what ONNX export takes."""
    return (Detect(), InsertMasks(), PackNM(), PackBitmap(), FoldMasks(), FuseEpilogue())


def training(trained: frozenset[str]) -> tuple[Pass, ...]:
    """With gradients: the weights named in `trained` get masks and stay trainable."""
    return (Detect(), InsertMasks(only=trained))


def check_skipped() -> None:
    """Raises InvalidSetting if SPARSEFX_SKIP names a pass that there is not."""
    known = ("apply_recipe", *(each.name for each in packing()), "lower")
    for name in sorted(debug.settings().skip):
        if name not in known:
            raise InvalidSetting(variable="SPARSEFX_SKIP", value=name, known=", ".join(known))
