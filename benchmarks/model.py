"""SmolLM2-135M under SparseFX and under torch.compile (Inductor), dense and pruned: paired times.

    python benchmarks/model.py [--prompt 128] [--pairs 40] [--json benchmarks/results/NAME.json]

The two run in turns in one process, and which goes first alternates, so that other load and clock
changes meet both. The ratio of each pair is Inductor / SparseFX: above 1, SparseFX is faster.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `examples`, when run as a script

import sparsefx
from benchmarks.record import machine, write
from examples.compile_smollm2 import recipe
from examples.decoding import Decoder, static_cache, wait
from examples.real_models import evaluation_tokens, smollm2

Run = Callable[[Decoder, int], Tensor]


@dataclass(frozen=True)
class Result:
    """Medians of both, and of the pairs' ratios the median, the 5th and the 95th percentile.

    kernels: sparse ones in the graph. difference: largest of the logits over the largest logit.
    """

    weights: str
    phase: str
    inductor_ms: float
    sparsefx_ms: float
    ratio: float
    low: float
    high: float
    kernels: int
    difference: float

    def __str__(self) -> str:
        return (
            f"{self.weights:<8}{self.phase:<9}{self.inductor_ms:>12.2f}{self.sparsefx_ms:>13.2f}"
            f"{self.ratio:>8.3f}  {self.low:.3f}..{self.high:.3f}"
            f"{self.kernels:>9}{self.difference:>12.1e}"
        )


HEAD = (
    f"{'weights':<8}{'phase':<9}{'Inductor ms':>12}{'SparseFX ms':>13}"
    f"{'ratio':>8}  {'5..95 %':<12}{'kernels':>9}{'difference':>12}"
)


def main(arguments: list[str] | None = None) -> None:
    """Prints the four comparisons; `--json` keeps them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt (128)")
    parser.add_argument("--pairs", type=int, default=40, help="pairs of runs for each ratio (40)")
    parser.add_argument("--layers", type=int, default=30, help="of the model's 30")
    parser.add_argument("--json", type=Path, help="keep machine, versions and figures here")
    options = parser.parse_args(arguments)
    print("\n".join(f"{key}: {value}" for key, value in machine().items()))
    results: list[dict[str, object]] = []
    for result in compare(options.prompt, options.pairs, options.layers):
        tqdm.write(f"{HEAD}\n{result}" if not results else str(result))
        results.append(asdict(result))
    if options.json:
        sizes = {name: vars(options)[name] for name in ("prompt", "pairs", "layers")}
        write(options.json, sizes, results)


def compare(prompt: int, pairs: int, layers: int) -> Iterator[Result]:
    """Dense, then pruned in place: Inductor's graphs take weights as inputs and serve both."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = smollm2(layers=layers)
    model = model.to(device)
    ids = evaluation_tokens(tokenizer, prompt)[None].to(device)
    inductor = copy(model)
    inductor.compile(dynamic=False)
    yield from _phases("dense", inductor, sparsefx.compile(model, dynamic=False), ids, pairs)
    sparsefx.sparsify(model, recipe(sparsefx.Magnitude()), inplace=True)  # speed alone counts
    yield from _phases("pruned", inductor, sparsefx.compile(model, dynamic=False), ids, pairs)


def _phases(
    weights: str, inductor: PreTrainedModel, fast: PreTrainedModel, ids: Tensor, pairs: int
) -> Iterator[Result]:
    length = ids.shape[1]
    token = ids[:, -1:]
    # One cache each, with room for one decoding step a pair and the first, which compiles.
    both = [Decoder(model, static_cache(model, length + pairs + 1)) for model in (inductor, fast)]
    yield _result(weights, "prefill", both, lambda decoder, _: decoder.prefill(ids), pairs, fast)
    yield _result(
        weights, "decode", both, lambda decoder, i: decoder.step(token, length + i), pairs, fast
    )


def _result(
    weights: str,
    phase: str,
    both: list[Decoder],
    run: Run,
    pairs: int,
    fast: PreTrainedModel,
) -> Result:
    expected, found = (run(decoder, 0) for decoder in both)  # compiles
    turns = tqdm(range(1, pairs + 1), desc=f"{weights} {phase}", leave=False)
    times = [_pair(both, run, turn) for turn in turns]
    inductor_times, sparsefx_times = zip(*times, strict=True)
    ratios = sorted(dense / sparse for dense, sparse in times)
    rows = sparsefx.explain(fast).rows
    graph = max(row.graph for row in rows)  # the one compiled last is the one just timed
    return Result(
        weights,
        phase,
        inductor_ms=statistics.median(inductor_times) * 1e3,
        sparsefx_ms=statistics.median(sparsefx_times) * 1e3,
        ratio=statistics.median(ratios),
        low=ratios[len(ratios) // 20],
        high=ratios[-1 - len(ratios) // 20],
        kernels=sum(bool(row.kernel) for row in rows if row.graph == graph),
        difference=float((found - expected).abs().max() / expected.abs().max()),
    )


def _pair(both: list[Decoder], run: Run, turn: int) -> tuple[float, float]:
    """Seconds of each of the two, run one after the other; at odd turns the second goes first."""
    taken = {}
    for index in (1, 0) if turn % 2 else (0, 1):
        start = time.perf_counter()
        run(both[index], turn)
        wait(both[index].model.device)
        taken[index] = time.perf_counter() - start
    return taken[0], taken[1]


if __name__ == "__main__":
    main()
