"""The catalogue of Triton kernels for GPUs: sparse linears on N:M and bitmap weights.

Importing this package does not import Triton; generating the text of a kernel does not either.
Only launching one, or compiling one ahead of time, does.
"""

from sparsefx.codegen.triton.kernels import TritonLinear, kernels

__all__ = ["TritonLinear", "kernels"]
