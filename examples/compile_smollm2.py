"""SmolLM2-135M with real weights: prune, compile, generate, explain, export to ONNX; all timed.

python examples/compile_smollm2.py [--tokens N] [--quick] [--inductor] [--out DIR]
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StaticCache

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `examples`, when run as a script

import sparsefx
from examples.decoding import Decoder, seconds, static_cache, wait
from examples.real_models import evaluation_tokens, perplexity, smollm2, wikipedia_text
from sparsefx.criteria import Criterion


def recipe(criterion: Criterion) -> sparsefx.Recipe:
    """2:4 in the MLPs, half of the weights in attention."""
    return sparsefx.Recipe(
        weights={
            "*.mlp.*": sparsefx.NM(2, 4, criterion),
            "*.self_attn.*": sparsefx.Unstructured(0.5, criterion),
        }
    )


@dataclass(frozen=True)
class Size:
    """How much: the first `layers` of 30 layers, `windows` texts of `context` tokens, and as many
    `samples` of half that length to calibrate on."""

    layers: int = 30
    context: int = 1024
    windows: int = 4
    samples: int = 8


QUICK = Size(layers=2, context=128, windows=2, samples=2)


@dataclass
class Line:
    """A line of the final table: perplexity, tokens/s of reading, of writing; None: not taken."""

    name: str
    perplexity: float | None = None
    prefill: float | None = None
    decode: float | None = None

    def __str__(self) -> str:
        numbers = (self.perplexity, self.prefill, self.decode)
        cells = ("-" if number is None else _short(number) for number in numbers)
        return f"  {self.name:<26}" + "".join(f"{cell:>14}" for cell in cells)


def _short(number: float) -> str:
    return f"{number:,.1f}" if number < 1e6 else f"{number:.1e}"


@dataclass
class Demo:
    """What the steps share."""

    size: Size
    count: int  # tokens to generate
    out: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tokens: Tensor  # the evaluation text, int64 [windows * context]
    cache: StaticCache
    lines: list[Line] = field(default_factory=list)

    @property
    def prompt(self) -> Tensor:
        """The first window of the evaluation text, [1, context]."""
        return self.tokens[None, : self.size.context]


def main(arguments: list[str] | None = None) -> None:
    """Runs the demo; see the module's text for the flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate (32)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the files (out)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="2 of the 30 layers and short texts: every step in a minute, the numbers mean nothing",
    )
    parser.add_argument(
        "--inductor",
        action="store_true",
        help="time decoding under torch.compile (Inductor) too: one more graph, a minute or two",
    )
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    demo = prepare(QUICK if options.quick else Size(), options.tokens, options.out)
    inductor = dense(demo, options.inductor)
    fast = pruned(demo, inductor)
    explain(demo, fast)
    export(demo)
    table(demo)
    print(f"\n{time.perf_counter() - start:.0f} s in all")


def prepare(size: Size, count: int, out: Path) -> Demo:
    """The model on the device at hand, the text, the cache."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with step("load SmolLM2-135M-Instruct (Q4_1, dequantised to float32)"):
        model, tokenizer = smollm2(layers=size.layers)
        model = model.to(device)
        tokens = evaluation_tokens(tokenizer, size.windows * size.context).to(device)
    cache = static_cache(model, size.context + 4 * count)
    return Demo(size, count, out, model, tokenizer, tokens, cache)


def dense(demo: Demo, with_inductor: bool) -> Decoder | None:
    """Measures the dense model. Returns Inductor's, whose graph takes pruned weights as well."""
    eager = Decoder(demo.model, demo.cache)
    with step("dense model, PyTorch eager: perplexity, decoding"):
        line = judge(demo, "dense, eager", eager)
        (line.decode,) = decode(demo, eager)
    if not with_inductor:
        return None
    inductor = copy(demo.model)
    inductor.compile(dynamic=False)
    compiled = Decoder(inductor, demo.cache)
    with step("dense model, torch.compile (Inductor): the graph that writes"):
        demo.lines.append(Line("dense, Inductor", decode=decode(demo, compiled)[0]))
    return compiled


def pruned(demo: Demo, inductor: Decoder | None) -> PreTrainedModel:
    """Prunes, compiles with SparseFX, generates, and times it in turns with what it replaces."""
    eager = Decoder(demo.model, demo.cache)
    with step("prune: 2:4 in the MLPs, unstructured 50 % in attention, by SparseGPT, one shot"):
        sparsefx.sparsify(demo.model, recipe(sparsefx.SparseGPT()), calibration(demo), inplace=True)
        expected = eager.prefill(demo.prompt)
    fast = sparsefx.compile(demo.model, dynamic=False)
    compiled = Decoder(fast, demo.cache)
    with step("SparseFX: compile the graph that reads, perplexity"):
        difference = (compiled.prefill(demo.prompt) - expected).abs().max() / expected.abs().max()
        line = judge(demo, "pruned, SparseFX", compiled)
    with step("SparseFX: compile the graph that writes, .generate()"):
        text = compiled.generate(demo.prompt, demo.count)
    others = {"eager": eager} | ({"Inductor": inductor} if inductor else {})
    with step(f"decode with SparseFX and {' and '.join(others)} in turns"):
        line.decode, *baselines = decode(demo, compiled, *others.values())
    for name, speed in zip(others, baselines, strict=True):
        demo.lines.insert(-1, Line(f"pruned, {name}", decode=speed))
    print(f"\nSparseFX against eager on the same weights: {difference:.1e} of the largest logit")
    print(f"prompt:    ...{demo.tokenizer.decode(demo.prompt[0, -24:])!r}")
    print(f"generated: {demo.tokenizer.decode(text)!r}")
    return fast


def calibration(demo: Demo) -> list[dict[str, object]]:
    """From the start of the text, far from what is evaluated."""
    length, samples = demo.size.context // 2, demo.size.samples
    ids = torch.tensor(demo.tokenizer(wikipedia_text())["input_ids"][: samples * length])
    rows = ids.view(samples, 1, length).to(demo.tokens.device)
    return [{"input_ids": row, "use_cache": False} for row in rows]


def judge(demo: Demo, name: str, decoder: Decoder) -> Line:
    """Perplexity, and the speed of reading its windows."""
    decoder.prefill(demo.prompt)  # compiles
    times = []

    def timed(ids: Tensor) -> Tensor:
        begin = time.perf_counter()
        logits = decoder.prefill(ids)
        wait(ids.device)
        times.append(time.perf_counter() - begin)
        return logits

    quality = perplexity(decoder.model, demo.tokens, demo.size.context, timed)
    demo.lines.append(Line(name, quality, demo.size.context / statistics.median(times)))
    return demo.lines[-1]


def decode(demo: Demo, *decoders: Decoder) -> list[float]:
    """Tokens/s of each, from the median of steps taken in turns on the prompt's next tokens."""
    Decoder(demo.model, demo.cache).prefill(demo.prompt)
    token, position = demo.prompt[:, -1:], demo.size.context
    times: list[list[float]] = [[] for _ in decoders]
    for index in tqdm(range(demo.count + 1), desc="decode", unit="token", leave=False):
        for decoder, taken in zip(decoders, times, strict=True):
            taken.append(seconds(decoder, token, position))
            position += 1
            if index == 0:
                taken.clear()  # compiled just now
    return [1 / statistics.median(taken) for taken in times]


def explain(demo: Demo, fast: PreTrainedModel) -> None:
    """The table of all candidates, on the terminal and as a page."""
    report = sparsefx.explain(fast)
    print(f"\n{report}\n")
    demo.out.mkdir(parents=True, exist_ok=True)
    report.to_html(demo.out / "report.html")
    report.to_json(demo.out / "report.json")
    sparsefx.pruning_report(demo.model).to_html(demo.out / "pruning.html")
    print(f"the same with filters and charts: {demo.out / 'report.html'}")
    print(f"what became of each weight: {demo.out / 'pruning.html'}")


def export(demo: Demo) -> None:
    """Packed ONNX, run by a stock onnxruntime on real text of another length than the example's."""
    path = demo.out / "smollm2.onnx"
    model = demo.model.cpu()
    example, ids = demo.tokens[None, :16].cpu(), demo.tokens[None, :48].cpu()
    shapes = {"input_ids": {1: torch.export.Dim("length", min=2, max=8192)}, "use_cache": None}
    with step(f"export to {path}"):
        arguments = {"input_ids": example, "use_cache": False}
        sparsefx.export_onnx(model, (), path, kwargs=arguments, dynamic_shapes=shapes)
    with step("run it with onnxruntime"):
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
        with torch.no_grad():
            expected = model(input_ids=ids, use_cache=False).logits
    worst = (torch.from_numpy(found) - expected).abs().max()
    size = sum(file.stat().st_size for file in demo.out.glob("smollm2.onnx*")) / 1e6
    weights = sum(parameter.nbytes for parameter in model.parameters()) / 1e6
    print(f"ONNX file: {size:.0f} MB, dense weights {weights:.0f} MB")
    print(
        f"largest |onnxruntime - PyTorch|: {worst:.2e} (largest logit {expected.abs().max():.1f})"
    )


def table(demo: Demo) -> None:
    """The figures side by side, and what they do not say."""
    print(f"\n  {'':<26}{'perplexity':>14}{'read tok/s':>14}{'write tok/s':>14}")
    for line in demo.lines:
        print(line)
    before, after = (line.perplexity for line in demo.lines if line.perplexity is not None)
    print(
        f"\nPerplexity {before:.4g} dense, {after:.4g} pruned: one shot, without training, on "
        f"{demo.size.samples} texts.\n"
        "Half of its weights is more than so small a model can spare; docs/pruning.md says what\n"
        "more data and a knapsack over layers give. Speeds hold for any weights of this pattern.\n"
        "'-': not measured, to save the minute that one more graph takes to compile."
    )


@contextmanager
def step(title: str) -> Iterator[None]:
    """Says what is going on and, afterwards, how long it took."""
    start = time.perf_counter()
    print(f"-- {title} ...", flush=True)
    yield
    print(f"   {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
