"""SparseFX's own share of compile time and memory, on pruned SmolLM2-135M.

    python benchmarks/compile_time.py [--layers 30] [--json benchmarks/results/NAME.json]

Own share: all passes, packing and the generation of kernels among them, without measuring
(guard="model") and without Inductor. Memory: the largest resident set while compiling, less what
the loaded model took; Inductor's is in it. Limits: 20 s on two cores, 1.5 times the weights.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `examples`, when run as a script

import sparsefx
from benchmarks.memory import peak_memory
from benchmarks.record import machine, write
from examples.compile_smollm2 import recipe
from examples.real_models import smollm2

SECONDS, MEMORY = 20.0, 1.5


def main(arguments: list[str] | None = None) -> None:
    """Prints the seconds of each pass, the totals and the limits; `--json` keeps them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=30, help="of the model's 30")
    parser.add_argument("--json", type=Path, help="keep machine, versions and figures here")
    options = parser.parse_args(arguments)
    result = measure(options.layers)
    for key, value in {**machine(), **result}.items():
        print(f"{key}: {value}")
    own, share = result["own seconds"], result["memory / weights"]
    print(f"own share {own} s (limit {SECONDS}), memory {share} x the weights (limit {MEMORY})")
    if options.json:
        write(options.json, {"layers": options.layers}, [result])


def measure(layers: int) -> dict[str, object]:
    """Compiles the graph of a prompt of 128 tokens; all figures by name."""
    model, _ = smollm2(layers=layers)
    sparsefx.sparsify(model, recipe(sparsefx.Magnitude()), inplace=True)  # speed alone counts
    weights = sum(parameter.nbytes for parameter in model.parameters())
    ids = torch.arange(128)[None]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)  # buffers that PyTorch itself needs
        with peak_memory() as memory:
            start = time.perf_counter()
            fast = sparsefx.compile(model, guard="model", dynamic=False)
            fast(input_ids=ids, use_cache=False)
            total = time.perf_counter() - start
    facts = sparsefx.explain(fast).facts
    passes = {key: value for key, value in facts.items() if key.startswith("seconds in ")}
    return {
        **passes,
        "own seconds": float(facts["seconds in passes"]),
        "seconds with Inductor": round(total, 1),
        "weights MB": round(weights / 1e6),
        "peak MB beyond the model, Inductor included": round(memory[0] / 1e6),
        "memory / weights": round(memory[0] / weights, 2),
    }


if __name__ == "__main__":
    main()
