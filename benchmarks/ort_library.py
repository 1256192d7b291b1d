"""An encoder in onnxruntime: our file with its library of kernels against stock fp32 and int8.

    python benchmarks/ort_library.py [--layers 12] [--sparsity 0.9] [--tokens 128] [--json PATH]

A BERT of random weights (hidden 768, FFN 3072: the time does not depend on their values), every
linear of its layers pruned. Rivals: the same file in a stock onnxruntime, the dense model's file,
and the dense file after onnxruntime's own constant folding and quantize_dynamic (per channel,
MatMul and Gemm). All run in
turn, so that other load on the machine meets all; a ratio is the median over the rounds.
"""

import argparse
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import nn
from transformers import BertConfig, BertModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sparsefx
from benchmarks import record

Run = Callable[[], list[np.ndarray]]


def main() -> None:
    """Exports, times, prints a table, and writes JSON if told to."""
    options = _options()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "int8.onnx").exists():
            _write(folder, options)
        sessions = _sessions(folder, options.threads)
        inputs = {
            "input_ids": np.random.default_rng(0).integers(
                1, 30000, (options.batch, options.tokens)
            ),
            "attention_mask": np.ones((options.batch, options.tokens), dtype=np.int64),
        }
        runs = {name: _run(session, inputs) for name, session in sessions.items()}
        ours, stock, *_ = (run()[0] for run in runs.values())
        print(f"largest |library - stock|: {np.abs(ours - stock).max():.2e}")
        times = _rounds(runs, options.rounds)
    results = _results(times)
    for key, value in record.machine().items():
        print(f"{key}: {value}")
    print(f"\n{'':28}{'ms':>8}{'library is x as fast':>24}")
    for row in results:
        print(f"{row['name']:28}{row['ms']:8.2f}{row['ratio']:24.2f}")
    if options.json:
        record.write(options.json, _named(options), results)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--folder", type=Path, help="keep the files here, or time those that are")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also keep the results here")
    return parser.parse_args()


def _named(options: argparse.Namespace) -> dict[str, object]:
    """The options without the paths of this machine."""
    return {key: value for key, value in vars(options).items() if not isinstance(value, Path)}


def _write(folder: Path, options: argparse.Namespace) -> None:
    """sparse.onnx and kernels.so, dense.onnx, int8.onnx."""
    folder.mkdir(parents=True, exist_ok=True)
    logging.getLogger().setLevel(logging.ERROR)  # quantize_dynamic advises on every run
    sparse, dense = folder / "sparse.onnx", folder / "dense.onnx"
    model = _model(options.layers)
    _export(model, dense, options)
    recipe = sparsefx.Recipe(weights={"encoder.*": sparsefx.Unstructured(options.sparsity)})
    pruned = sparsefx.sparsify(model, recipe, progress=False)
    _export(pruned, sparse, options, library=folder / "kernels.so")
    # The weights of the file stand behind transposes, behind which quantize_dynamic does not look.
    folded = folder / "folded.onnx"
    _session(dense, options.threads, folded=folded)
    quantize_dynamic(
        folded,
        folder / "int8.onnx",
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        weight_type=QuantType.QInt8,
    )


def _sessions(folder: Path, threads: int) -> dict[str, onnxruntime.InferenceSession]:
    return {
        "sparse file, library": _session(folder / "sparse.onnx", threads, folder / "kernels.so"),
        "sparse file, stock": _session(folder / "sparse.onnx", threads),
        "dense file fp32, stock": _session(folder / "dense.onnx", threads),
        "int8 dynamic, stock": _session(folder / "int8.onnx", threads),
    }


def _model(layers: int) -> nn.Module:
    return BertModel(BertConfig(num_hidden_layers=layers), add_pooling_layer=False).eval()


def _export(
    model: nn.Module, path: Path, options: argparse.Namespace, library: Path | None = None
) -> None:
    free = torch.export.Dim.DYNAMIC
    ids = torch.randint(1, 30000, (max(2, options.batch), options.tokens))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    dynamic = {key: {0: free, 1: free} for key in inputs}
    sparsefx.export_onnx(
        model,
        (),
        path,
        kwargs=inputs,
        dynamic_shapes=dynamic,
        library=library,
        check=library is not None,  # what the library does not make faster is left alone then
    )


def _session(
    path: Path, threads: int, library: Path | None = None, folded: Path | None = None
) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Threads that spin when a run ends would take a core from the session that is next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if library is not None:
        options.register_custom_ops_library(str(library))
    if folded is not None:
        options.optimized_model_filepath = str(folded)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _run(session: onnxruntime.InferenceSession, inputs: dict[str, np.ndarray]) -> Run:
    names = {value.name for value in session.get_inputs()}
    feed = {name: array for name, array in inputs.items() if name in names}
    return lambda: session.run(None, feed)


def _rounds(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each; the order turns round every time."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name in list(runs)[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            runs[name]()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def _results(times: dict[str, list[float]]) -> list[dict[str, object]]:
    ours = next(iter(times.values()))
    return [
        {
            "name": name,
            "ms": statistics.median(each),
            "ratio": statistics.median(a / b for a, b in zip(each, ours, strict=True)),
        }
        for name, each in times.items()
    ]


if __name__ == "__main__":
    main()
