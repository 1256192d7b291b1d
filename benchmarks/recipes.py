"""SmolLM2-135M writing tokens within 1.1 x the dense perplexity: which recipe is the fastest.

    python benchmarks/recipes.py [--recipe NAME ...] [--json benchmarks/results/NAME.json]

Every recipe is applied to the 210 linears of all blocks, and to the head where it says so, one
shot, calibrated on the start of the Wikipedia text; its perplexity is that of windows spread over
the middle third, as `prune.py` has it. Then the compiled model and Inductor's in fp32 and bf16,
both of dense weights, decode in turns at batch 1, behind a prompt of 128 tokens.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `examples`, when run as a script

import sparsefx
from benchmarks import model as models
from benchmarks import record
from benchmarks.prune import evaluation_windows, perplexities
from examples.real_models import evaluation_tokens, smollm2, wikipedia_text
from sparsefx import Knapsack, Recipe, SparseGPT, Unstructured
from sparsefx.report_rows import stored_bytes

LIMIT = 1.1
LENGTH = 512  # tokens of a calibration sequence
BLOCKS, HEAD = "model.layers.*", "lm_head.weight"


def pruned(share: float, values: str = "") -> Unstructured:
    """A share of zeros anywhere, by SparseGPT."""
    return Unstructured(share, SparseGPT(), values=values)


INT8, DYNAMIC = Unstructured(0, values="int8"), Unstructured(0, values="int8_dynamic")
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True)
class Candidate:
    """A recipe to try. is_dynamic: the compiled model rounds inputs, so perplexity is taken there.

    says: what it does, for the table.
    """

    says: str
    recipe: Recipe | None
    is_dynamic: bool = False


RECIPES = {
    "dense": Candidate("nothing", None),
    "zeros-20": Candidate("20 % zeros, float32", Recipe({BLOCKS: pruned(0.2)})),
    "int8": Candidate("int8 weights, no zeros; the head too", Recipe({HEAD: INT8, BLOCKS: INT8})),
    "int8-dynamic": Candidate(
        "int8 weights and inputs, no zeros; the head too",
        Recipe({HEAD: DYNAMIC, BLOCKS: DYNAMIC}),
        is_dynamic=True,
    ),
    "int8-dynamic-20": Candidate(
        "int8 weights and inputs, 20 % zeros; the head int8, dense",
        Recipe({HEAD: DYNAMIC, BLOCKS: pruned(0.2, "int8_dynamic")}),
        is_dynamic=True,
    ),
    "int8-dynamic-30": Candidate(
        "int8 weights and inputs, 30 % zeros; the head int8, dense",
        Recipe({HEAD: DYNAMIC, BLOCKS: pruned(0.3, "int8_dynamic")}),
        is_dynamic=True,
    ),
    "int8-dynamic-30-knapsack": Candidate(
        "the same, the zeros spread by expected loss",
        Recipe(
            {HEAD: DYNAMIC, BLOCKS: pruned(0.3, "int8_dynamic")},
            allocation=Knapsack(tuple(pruned(each, "int8_dynamic") for each in SHARES)),
        ),
        is_dynamic=True,
    ),
}


@dataclass(frozen=True)
class Result:
    """A line of the table; perplexity_ratio: to dense; megabytes: of the stored linears."""

    recipe: str
    says: str
    perplexity: float
    perplexity_ratio: float
    megabytes: float
    ms: dict[str, float]
    ratios: dict[str, models.Ratio]
    kernels: int

    def __str__(self) -> str:
        told = ", ".join(f"{each.ratio:.2f} x {name}" for name, each in self.ratios.items())
        return (
            f"{self.recipe:<18}{self.perplexity:>8.2f}{self.perplexity_ratio:>8.3f}"
            f"{self.megabytes:>7.0f} MB{self.ms['SparseFX']:>8.1f} ms, {told}; "
            f"{self.kernels} kernels: {self.says}"
        )


def main(arguments: list[str] | None = None) -> None:
    """Prints a line for each recipe, and keeps them if asked, after each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences (32)")
    parser.add_argument("--windows", type=int, default=4, help="of text that are evaluated (4)")
    parser.add_argument("--tokens", type=int, default=2048, help="of each of them (2048)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt (128)")
    parser.add_argument("--rounds", type=int, default=30, help="of steps in turns (30)")
    parser.add_argument("--layers", type=int, default=30, help="of the model's 30")
    parser.add_argument("--json", type=Path, help="keep machine, versions and figures here")
    options = parser.parse_args(arguments)
    results = []
    for result in tried(options):
        print(result, flush=True)
        results.append(asdict(result))
        if options.json:
            said = {key: value for key, value in vars(options).items() if key != "json"}
            record.write(options.json, {**said, "limit": LIMIT}, results)


def tried(options: argparse.Namespace) -> Iterator[Result]:
    """Each recipe on the same model, whose dense weights are put back in between."""
    model, tokenizer = smollm2(layers=options.layers)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    short = smollm2(layers=options.layers)[0].to(torch.bfloat16)
    rivals = {
        f"Inductor {name}": models.inductor(each)
        for name, each in {"fp32": model, "bf16": short}.items()
    }
    ids = tokenizer(wikipedia_text())["input_ids"][: options.samples * LENGTH]
    batches = [
        {"input_ids": each[None], "use_cache": False}
        for each in torch.tensor(ids).view(options.samples, LENGTH)
    ]
    windows = evaluation_windows(tokenizer, options.windows, options.tokens)
    dense = _perplexity(model, windows)
    prompt = evaluation_tokens(tokenizer, options.prompt)[None]
    for name in options.recipe:
        candidate = RECIPES[name]
        model.load_state_dict(kept)
        if candidate.recipe:
            sparsefx.sparsify(model, candidate.recipe, batches, inplace=True)
        judge = model
        if candidate.is_dynamic:
            judge = sparsefx.compile(model, guard="off", dynamic=False)
        found = _perplexity(judge, windows) if candidate.recipe else dense
        fast = sparsefx.compile(model, dynamic=False)
        timed = models.compared(
            "SmolLM2-135M", (name, "decode", "fp32"), fast, rivals, prompt, options
        )
        stored = sum(stored_bytes(row) for row in sparsefx.explain(fast).rows)
        said = (name, candidate.says, found, found / dense, stored / 1e6)
        yield Result(*said, timed.ms, timed.ratios, timed.kernels)


def _perplexity(model: PreTrainedModel, windows: Tensor) -> float:
    each = perplexities(model, windows)
    return math.exp(sum(map(math.log, each)) / len(each))


if __name__ == "__main__":
    main()
