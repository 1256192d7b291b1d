"""Generated C++ kernels for sparse attention on CPU."""
