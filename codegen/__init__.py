"""The catalogue of targets: C++ for CPUs, Triton for GPUs, ONNX."""
