"""Graph module -> ONNX file that a stock onnxruntime loads."""
