"""What the shell commands do, each with the public API."""

import argparse
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

import sparsefx
from sparsefx import debug, guard, tuned
from sparsefx.detect import tightest
from sparsefx.errors import UnreadableInput, UnreadableModel
from sparsefx.input_files import check_call, load_batches, load_call
from sparsefx.model_files import load_model, load_tensors, pretrained, sample_inputs
from sparsefx.prune.report.records import PruneReport
from sparsefx.report import Report, Row


def explain(args: argparse.Namespace) -> None:
    """Prints the table of a model's candidates and writes it as JSON and HTML where told to."""
    report = _explain_file(args) if args.model.is_file() else _explain_folder(args)
    print(report)
    _write_report(report, args)


def sparsify(args: argparse.Namespace) -> None:
    """Prunes by a recipe and saves a sparse checkpoint folder."""
    if args.out.exists():
        raise FileExistsError(f"{args.out} exists; give a new folder, or remove it")
    for path in (args.json, args.html):
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise FileNotFoundError(f"{path} is no place for a file")
    recipe = _recipe(args)
    assert recipe is not None  # a required argument
    model = load_model(args.model, args.dtype)
    sparsefx.sparsify(model, recipe, _calibration(model, args), inplace=True, state=args.state)
    report = sparsefx.pruning_report(model)
    print(report)
    sparsefx.save(model, args.out, recipe=recipe)
    _write_report(report, args)
    if args.model.is_dir():
        _copy_description(model, args.model, args.out)
    dense = sum(tensor.nbytes for tensor in model.state_dict().values())
    stored = sum(path.stat().st_size for path in args.out.glob("*.safetensors"))
    print(f"wrote {args.out}: {stored / 1e6:.1f} MB, {stored / dense:.2f} of the dense weights")


def export(args: argparse.Namespace) -> None:
    """Writes an ONNX file that a stock onnxruntime loads, after comparing it with PyTorch."""
    if args.model.is_file():
        rule = "a bare weight file does not say how the weights are used"
        remedy = "Give a Hugging Face folder, or call sparsefx.export_onnx on the model in Python"
        raise UnreadableModel(path=args.model, rule=rule, remedy=remedy)
    model = load_model(args.model, args.dtype)
    pretrained(model).config.use_cache = False  # a cache is no tensor, and ONNX has tensors only
    # torch.export takes an axis of length 1 for one that is always 1.
    inputs = _inputs(model, args, batch=2 if args.dynamic else 1)
    report = sparsefx.export_onnx(
        model,
        (),
        args.out,
        kwargs=inputs,
        dynamic_shapes=_dynamic(inputs) if args.dynamic else None,
        recipe=_recipe(args),
        calibration=_calibration(model, args),
        form=args.form,
        library=args.ort_library,
        guard=args.guard,
        opset=args.opset,
    )
    print(f"wrote {args.out}: {args.out.stat().st_size / 1e6:.1f} MB, checked against PyTorch")
    if args.ort_library is not None:
        print(f"wrote {args.ort_library}: {report.facts['library']}, checked likewise")
        print(f"milliseconds a call: {report.facts['ms a call']}")


def bench(args: argparse.Namespace) -> None:
    """Times the model under torch.compile and under SparseFX, in turns."""
    model = load_model(args.model, args.dtype)
    model, inputs = _on_device(model, _inputs(model, args), args.target)
    dense = torch.compile(model)
    fast = _compile(model, args)
    pairs = _paired_ms(lambda: dense(**inputs), lambda: fast(**inputs), args.runs)
    first, second = (statistics.median(times) for times in zip(*pairs, strict=True))
    low, middle, high = statistics.quantiles((a / b for a, b in pairs), n=4)
    print(f"torch.compile {first:.3f} ms, sparsefx {second:.3f} ms, medians of {args.runs} pairs")
    if args.save is not None:
        tuned.write(args.save, guard.known(debug.settings().cache))
        print(f"wrote {args.save}")
    print(f"sparsefx is {middle:.2f}x as fast, quartiles {low:.2f} to {high:.2f}")


def _compile(model: nn.Module, args: argparse.Namespace) -> nn.Module:
    return sparsefx.compile(
        model,
        args.target,
        recipe=_recipe(args),
        calibration=_calibration(model, args),
        guard=args.guard,
        tuned=args.tuned,
    )


def _paired_ms(
    first: Callable[[], object], second: Callable[[], object], runs: int
) -> list[tuple[float, float]]:
    """Milliseconds of both, `runs` times in turn, so that other load meets both; warm-up first."""
    for _ in range(3):
        first(), second()
    bar = tqdm(range(runs), desc="bench", unit="pair")
    return [(_clock_ms(first), _clock_ms(second)) for _ in bar]


def _clock_ms(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def _write_report(report: Report | PruneReport, args: argparse.Namespace) -> None:
    for path, write in ((args.json, report.to_json), (args.html, report.to_html)):
        if path is not None:
            write(path)
            print(f"wrote {path}")


def _explain_folder(args: argparse.Namespace) -> Report:
    model = load_model(args.model, args.dtype)
    model, inputs = _on_device(model, _inputs(model, args), args.target)
    fast = _compile(model, args)
    fast(**inputs)
    return sparsefx.explain(fast)


def _explain_file(args: argparse.Namespace) -> Report:
    if args.recipe is not None:
        rule = "a bare weight file is listed as it is, without a recipe"
        raise UnreadableModel(path=args.model, rule=rule, remedy="Run sparsefx sparsify first")
    facts = {"read as": "[out, in], the order of nn.Linear"}
    report = Report(title=args.model.name, facts=facts)
    for name, weight in load_tensors(args.model).items():
        if weight.dim() == 2 and weight.is_floating_point():
            report.rows.append(_row(name, weight))
    return report


def _row(name: str, weight: Tensor) -> Row:
    found = tightest(weight)
    return Row(
        name=name,
        op="weight",
        shape="x".join(map(str, weight.shape)),
        pattern="dense" if found.pattern is None else str(found.pattern),
        reason=found.reason or "a bare file is not run; explain the model's folder for a kernel",
        dense_bytes=weight.nbytes,
        stored_bytes=weight.nbytes,
    )


def _inputs(model: nn.Module, args: argparse.Namespace, batch: int = 1) -> dict[str, object]:
    if args.input is not None:
        return dict(load_call(args.input, model))
    return sample_inputs(model, args.rows, batch)


def _recipe(args: argparse.Namespace) -> sparsefx.Recipe | None:
    if args.recipe is None:
        return None
    recipe = sparsefx.Recipe.from_toml(args.recipe)
    if args.model.is_file() and (recipe.found_by_running() or recipe.attention is not None):
        rule = "a bare weight file cannot be run, and the recipe is to be calibrated"
        remedy = "Give a Hugging Face folder, or a recipe of magnitudes, without attention"
        raise UnreadableModel(path=args.model, rule=rule, remedy=remedy)
    return recipe


def _calibration(model: nn.Module, args: argparse.Namespace) -> list[dict[str, Tensor]] | None:
    """The batches that the recipe is to be calibrated on, on the device of `model`."""
    path = args.calibration
    if path is None:
        return None
    if args.recipe is None:
        rule = "calibration data is for a recipe, and none was given"
        raise UnreadableInput(path=path, rule=rule, remedy="Add --recipe TOML")
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    batches = [
        {name: tensor.to(device) for name, tensor in batch.items()} for batch in load_batches(path)
    ]
    check_call(path, model, batches[0])
    return batches


def _on_device(
    model: nn.Module, inputs: dict[str, object], target: str | None
) -> tuple[nn.Module, dict[str, object]]:
    """Both on the GPU if there is one and the target is not the CPU."""
    device = "cuda" if torch.cuda.is_available() and target != "cpu" else "cpu"
    moved = tree_map_only(Tensor, lambda tensor: tensor.to(device), inputs)
    return model.to(device), moved


def _copy_description(model: nn.Module, source: Path, out: Path) -> None:
    """What a Hugging Face folder holds beside the weights: configuration and tokenizer."""
    for path in source.iterdir():
        if path.suffix in (".json", ".txt", ".model", ".jinja") and ".index." not in path.name:
            shutil.copy(path, out)
    pretrained(model).config.save_pretrained(out)


def _dynamic(inputs: Mapping[str, object]) -> dict[str, object]:
    """Batch varies everywhere; the second axis too where the input is a sequence of tokens."""
    free = torch.export.Dim.DYNAMIC
    return {
        name: {0: free, 1: free} if tensor.dim() == 2 else {0: free}
        for name, tensor in inputs.items()
        if isinstance(tensor, Tensor)
    }
