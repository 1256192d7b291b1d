"""2:4 on sparse tensor cores by the libraries that torch brings: cuSPARSELt and CUTLASS."""

from sparsefx.codegen.cuda_library.kernels import LIBRARY_KERNELS as LIBRARY_KERNELS
