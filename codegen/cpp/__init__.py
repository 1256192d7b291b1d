"""Generated C++ kernels for packed linears on CPU."""

from sparsefx.codegen.cpp.kernels import TARGET_KERNELS, CppLinear

__all__ = ["TARGET_KERNELS", "CppLinear"]
