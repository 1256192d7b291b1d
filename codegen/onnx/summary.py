"""What an export gained, in words: honest about what a stock runtime does with zeros."""

from sparsefx.codegen.onnx.export import ExportFacts


def summary(facts: ExportFacts) -> str:
    """A few lines for reports and the shell."""
    lines = [
        f"{facts.path}: {_size(facts.bytes)}, {facts.nodes} nodes, opset {facts.opset}, "
        f"{facts.form} form"
    ]
    if facts.weights:
        dense = sum(weight.dense_bytes for weight in facts.weights)
        stored = sum(weight.stored_bytes for weight in facts.weights)
        lines += [
            f"{len(facts.weights)} packed weights: {_size(stored)} instead of {_size(dense)} "
            f"({stored / dense:.0%})",
            "A stock onnxruntime unpacks them at load: it gains file size, not time. "
            + _FORM[facts.form],
        ]
    if facts.max_abs_error is None:
        lines.append("Not compared with PyTorch (check=False)")
    else:
        lines.append(
            f"Largest difference from PyTorch: {facts.max_abs_error:.2g}, "
            f"at {len(facts.shapes)} sets of input shapes"
        )
    return "\n".join(lines)


_FORM = {
    "standard": "Every node is a standard operator.",
    "functions": "A runtime with kernels for the domain 'sparsefx' may run them packed.",
}


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
