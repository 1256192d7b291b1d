"""One budget spread over the layers of a model: pure functions on numbers and tensors."""
