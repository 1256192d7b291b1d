"""Generated Triton kernels for sparse attention."""
