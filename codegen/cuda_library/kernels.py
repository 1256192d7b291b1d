"""Library kernels as data: which 2:4 linears they accept, how the weight is packed for them.

They pay where the work decides, from some hundred rows on; the guard says where.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from sparsefx import debug, devices, diskcache
from sparsefx.codegen.cuda_library.operator import ROWS
from sparsefx.epilogue import features
from sparsefx.formats import PackedNM, unpack_nm
from sparsefx.target import Kernel, LinearSpec, Lowering

# library -> (rows, columns) of which a 16-bit weight's sizes must be multiples
# (torch.sparse.SparseSemiStructuredTensor*._DTYPE_SHAPE_CONSTRAINTS)
_SIZES = {"cusparselt": (16, 16), "cutlass": (32, 64)}
_FITTING = ((2, 4), (1, 4), (2, 8))  # patterns that keep at most 2 of each 4
_SPARSE_CORES = 8  # compute capability with sparse tensor cores; CUTLASS's in torch is for 8.x only


@dataclass(frozen=True)
class LibraryLinear:
    """A 2:4 linear by `library`, "cusparselt" or "cutlass"."""

    library: str
    layout: str = "nm"

    @property
    def name(self) -> str:
        """Shown in reports; stable."""
        return f"{self.library}_linear"

    def accepts(self, spec: LinearSpec) -> str | None:
        """None for yes, or the reason for no."""
        if spec.layout != self.layout or (spec.n, spec.m) not in _FITTING:
            return "sparse tensor cores take weights of which at most 2 of 4 are kept"
        if spec.values:
            return f"it reads values of the input's type, not {spec.values}"
        if spec.dtype not in (torch.float16, torch.bfloat16):
            return f"it computes float16 and bfloat16, not {spec.dtype}"
        rows, columns = _SIZES[self.library]
        if spec.out_features % rows or spec.in_features % columns:
            return f"the weight's sizes are not multiples of {rows} and {columns}"
        if not spec.rows_vary and spec.rows % ROWS:
            return f"{spec.rows} rows are not a multiple of {ROWS}"
        return _absent(self.library)

    def tunings(self, spec: LinearSpec) -> "tuple[Kernel, ...]":
        """One: cuSPARSELt searches among its algorithms when it is lowered."""
        return (self,)

    def lower(self, spec: LinearSpec, packed: tuple[Tensor, ...]) -> Lowering:
        """Packs the weight as the library stores it; cuSPARSELt looks for its fastest algorithm."""
        values, index = packed
        weight = unpack_nm(PackedNM(values, index), spec.n, spec.m)
        if self.library == "cusparselt":
            stored: tuple[Tensor, ...] = (torch._cslt_compress(weight),)
            algorithm = _algorithm(spec, stored[0])
        else:
            stored, algorithm = sparse_semi_structured_from_dense_cutlass(weight), 0
        handle = f"{self.library}|{algorithm}|{spec.epilogue}"
        text = f"{self.library} of torch {torch.__version__}, algorithm {algorithm}"
        out = features(spec.out_features, spec.epilogue)
        op = torch.ops.sparsefx_cuda.linear.default
        return Lowering(op, stored, handle, out, text, "", multiple=ROWS)


LIBRARY_KERNELS = (LibraryLinear("cusparselt"), LibraryLinear("cutlass"))


def _absent(library: str) -> str | None:
    """Why the library cannot run here."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device is at hand"
    major, minor = torch.cuda.get_device_capability()
    if major < _SPARSE_CORES:
        return f"a GPU of compute capability {major}.{minor} has no sparse tensor cores"
    if library == "cutlass" and major > _SPARSE_CORES:
        return "torch's CUTLASS kernels are for compute capability 8.x"
    if library == "cusparselt" and not torch.backends.cusparselt.is_available():
        return "this torch has no cuSPARSELt"
    return None


def _algorithm(spec: LinearSpec, compressed: Tensor) -> int:
    """The fastest of cuSPARSELt's algorithms for the shape; searched for once, kept on disk."""
    rows = max(ROWS, spec.rows // ROWS * ROWS)
    shape = (spec.out_features, spec.in_features, rows, spec.dtype, spec.has_bias)
    key = {"cusparselt": repr(shape), **devices.surroundings(compressed.device)}
    folder = debug.settings().cache / "cusparselt"
    found = diskcache.recall(folder, key)
    known = diskcache.number(found.get("algorithm")) if found else None
    if known is not None:
        return int(known)
    x = torch.zeros(rows, spec.in_features, dtype=spec.dtype, device=compressed.device)
    bias = x.new_zeros(spec.out_features) if spec.has_bias else None
    algorithm = int(
        torch._cslt_sparse_mm_search(compressed, x.t(), bias=bias, transpose_result=True)
    )
    diskcache.remember(folder, key, {"algorithm": algorithm})
    return algorithm
