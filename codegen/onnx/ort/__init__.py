"""A library of generated kernels for onnxruntime: the packed linears of a model, run sparse."""
