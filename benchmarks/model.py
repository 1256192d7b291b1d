"""Whole models under SparseFX and under torch.compile (Inductor), dense and pruned, in turns.

    python benchmarks/model.py [--prompt 128] [--rounds 30] [--json benchmarks/results/NAME.json]

On CPU SmolLM2-135M reads a prompt and writes a token, in float32 and bfloat16, pruned 2:4 in its
MLPs and 50 % in attention. On a GPU a model of the shape of Llama-3-8B writes a token at batch 1,
bfloat16, all linears of its blocks 2:4; both under CUDA graphs (mode="reduce-overhead"). Weights
are pruned by magnitude: only speed counts here. Ratios are Inductor / SparseFX, within a round.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `examples`, when run as a script

import sparsefx
from benchmarks import record, turns
from examples.compile_smollm2 import recipe
from examples.decoding import Decoder, static_cache, wait
from examples.real_models import evaluation_tokens, smollm2

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Run = Callable[[Decoder, int], Tensor]


@dataclass(frozen=True)
class Ratio:
    """Of the rounds' ratios the median, the 5th and the 95th percentile."""

    ratio: float
    low: float
    high: float

    @classmethod
    def of(cls, first: Sequence[float], second: Sequence[float]) -> "Ratio":
        """first / second, round by round."""
        ratios = sorted(a / b for a, b in zip(first, second, strict=True))
        rank = len(ratios) // 20
        chosen = (statistics.median(ratios), ratios[rank], ratios[-1 - rank])
        return cls(*(round(each, 3) for each in chosen))


@dataclass(frozen=True)
class Result:
    """Medians in milliseconds by name, and the ratio of each Inductor to SparseFX.

    kernels: sparse ones in SparseFX's graph. difference: of its logits from those of Inductor in
    the same dtype, the largest over the largest logit.
    """

    model: str
    weights: str
    phase: str
    dtype: str
    ms: dict[str, float]
    ratios: dict[str, Ratio]
    kernels: int
    difference: float

    def __str__(self) -> str:
        told = ", ".join(
            f"{each.ratio:.3f} ({each.low:.2f}..{each.high:.2f}) x {name}, {self.ms[name]:.2f} ms"
            for name, each in self.ratios.items()
        )
        return (
            f"{self.weights:<7}{self.phase:<8}SparseFX {self.dtype} {self.ms['SparseFX']:.2f} ms: "
            f"{told}; {self.kernels} kernels, difference {self.difference:.1e}"
        )


def main(arguments: list[str] | None = None) -> None:
    """Prints the comparisons; `--json` keeps them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt (128)")
    parser.add_argument("--rounds", type=int, default=30, help="of runs in turns (30)")
    parser.add_argument("--layers", type=int, default=30, help="of the model's 30 (Llama: 32)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--json", type=Path, help="keep machine, versions and figures here")
    options = parser.parse_args(arguments)
    print("\n".join(f"{key}: {value}" for key, value in record.machine().items()))
    results = []
    for result in (llama if torch.cuda.is_available() else small)(options):
        print(result, flush=True)
        results.append(asdict(result))
    if options.json:
        sizes = {name: vars(options)[name] for name in ("prompt", "rounds", "layers", "dtype")}
        record.write(options.json, sizes, results)


def small(options: argparse.Namespace) -> Iterator[Result]:
    """SmolLM2-135M. Inductor's graphs take weights as inputs and serve dense and pruned."""
    models: dict[str, PreTrainedModel] = {}
    for name in options.dtype:
        loaded, tokenizer = smollm2(layers=options.layers)
        models[name] = loaded.to(DTYPES[name])
    ids = evaluation_tokens(tokenizer, options.prompt)[None]
    rivals = {f"Inductor {name}": inductor(model) for name, model in models.items()}
    for weights in ("dense", "pruned"):
        for model in models.values():
            if weights == "pruned":
                sparsefx.sparsify(model, recipe(sparsefx.Magnitude()), inplace=True)
        for name, model in models.items():
            fast = sparsefx.compile(model, dynamic=False)
            for phase in ("prefill", "decode"):
                yield compared("SmolLM2-135M", (weights, phase, name), fast, rivals, ids, options)


def llama(options: argparse.Namespace) -> Iterator[Result]:
    """A model of the shape of Llama-3-8B with random weights, batch 1."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=min(options.layers + 2, 32),
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_theta=500000.0,
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    ids = torch.randint(config.vocab_size, (1, options.prompt), device="cuda")
    pruned = sparsefx.Recipe({"model.layers.*": sparsefx.NM(2, 4)})
    sparsefx.sparsify(model, pruned, inplace=True)
    rivals = {"Inductor bf16": inductor(model, "reduce-overhead")}
    fast = sparsefx.compile(model, mode="reduce-overhead", dynamic=False)
    names = ("pruned", "decode", "bf16")
    yield compared("Llama-8B-shaped", names, fast, rivals, ids, options)


def inductor(model: PreTrainedModel, mode: str | None = None) -> PreTrainedModel:
    """`model` under torch.compile, its weights shared."""
    compiled = copy(model)
    compiled.compile(dynamic=False, mode=mode)
    return compiled


def compared(
    model: str,
    names: tuple[str, str, str],
    fast: PreTrainedModel,
    rivals: Mapping[str, PreTrainedModel],
    ids: Tensor,
    options: argparse.Namespace,
) -> Result:
    """Times one phase of all in turns; `names`: weights, phase and dtype of `fast`."""
    _, phase, dtype = names
    decoders = {
        name: Decoder(each, static_cache(each, ids.shape[1] + options.rounds + 2))
        for name, each in {"SparseFX": fast, **rivals}.items()
    }
    run = partial(_run, phase, ids)
    found, expected = (run(decoders[name], 0) for name in ("SparseFX", f"Inductor {dtype}"))
    rows = sparsefx.explain(fast).rows
    graph = max(row.graph for row in rows)  # the one compiled last is the one that is timed
    sides = [_side(name, run, decoder, options.rounds) for name, decoder in decoders.items()]
    times = turns.in_turns(sides, 0, fewest=options.rounds)
    return Result(
        model,
        *names,
        ms={name: round(turns.median(each) / 1e3, 3) for name, each in times.items()},
        ratios={name: Ratio.of(times[name], times["SparseFX"]) for name in rivals},
        kernels=sum(bool(row.kernel) for row in rows if row.graph == graph),
        difference=float((found - expected).abs().max() / expected.abs().max()),
    )


def _run(phase: str, ids: Tensor, decoder: Decoder, step: int) -> Tensor:
    """Reads the prompt, or the token behind it at its place."""
    length = ids.shape[1]
    is_prefill = phase == "prefill"
    logits = decoder.prefill(ids) if is_prefill else decoder.step(ids[:, -1:], length + step)
    wait(ids.device)
    return logits


def _side(name: str, run: Run, decoder: Decoder, rounds: int) -> turns.Side:
    return turns.Side(name, [partial(run, decoder, step) for step in range(rounds)])


if __name__ == "__main__":
    main()
