"""Graph module -> ONNX file, checked: the one entry of this folder."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from tqdm import tqdm

from sparsefx.codegen.onnx.attention_nodes import WrittenAttention
from sparsefx.codegen.onnx.check import Probe, check_file, difference, probes, session
from sparsefx.codegen.onnx.lower import StoredWeight, lower
from sparsefx.codegen.onnx.ort.guard import demote, losers, taken
from sparsefx.codegen.onnx.ort.library import LibraryFacts, refuse, staged_library, timed
from sparsefx.codegen.onnx.translate import to_onnx, to_program
from sparsefx.errors import ExportFailed, NotExportable, SparseFXError, UnknownOption
from sparsefx.graph import DynamicShapes
from sparsefx.ops import MASKED_OPS

FORMS = ("standard", "functions")
OPSETS = (20, 24)
_ONE_FILE = 2**31 - 2**26  # a protobuf message ends at 2 GiB; 64 MiB are for nodes and names


@dataclass(frozen=True)
class ExportFacts:
    """What was written.

    bytes: size of the file, and of its ".data" companion if there is one; nodes: nodes of the main
    graph; weights: the packed ones; attentions: the sparse ones; max_abs_error: largest
    |onnxruntime - PyTorch| over all probes, None without check; shapes: input shapes of each probe;
    library: the kernels beside it, None without; seconds: wall-clock time of it all.
    """

    path: Path
    form: str
    opset: int
    bytes: int
    nodes: int
    weights: tuple[StoredWeight, ...]
    attentions: tuple[WrittenAttention, ...]
    max_abs_error: float | None
    shapes: tuple[dict[str, tuple[int, ...]], ...]
    library: LibraryFacts | None
    seconds: float


# ExportFacts.max_abs_error and ExportFacts.shapes
_Compared = tuple[float | None, tuple[dict[str, tuple[int, ...]], ...]]
_UNCHECKED: _Compared = (None, ())


def export(
    gm: fx.GraphModule,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    path: Path,
    *,
    reference: Callable[..., object],
    dynamic_shapes: DynamicShapes = None,
    form: str = "standard",
    opset: int = 20,
    library: Path | None = None,
    guard: bool = True,
    check: bool = True,
    progress: bool = False,
    one_file: int = _ONE_FILE,
) -> ExportFacts:
    """Writes `gm` as an ONNX file that a stock onnxruntime loads; it appears whole or not at all.

    gm: normal form, linears and attentions sparse or dense, masks folded. args, kwargs: example
    inputs (cloned: aliased ones give a wrong graph). dynamic_shapes: as torch.export takes them.
    form: "standard" or "functions" (lower.py). opset: 20 or 24. library: where to write kernels for
    its packed linears (ort/), which need form="functions"; with `guard` and `check` it takes only
    those that it makes faster at the example's sizes. reference: what gm must equal, thresholds
    included (where gm has sparse attention, gm itself will do); with `check` it is compared with
    onnxruntime at the example's sizes and, where sizes are dynamic, two others.
    progress: show a bar. one_file: bytes of weights above which they go to `<path>.data`.

    Raises UnknownOption, NotExportable (masks left, bfloat16, sparse attention in float64, opset),
    ExportFailed (no compiler for the library, too).
    """
    start = time.perf_counter()
    _refuse(gm, path, form, opset, library)
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), (args, dict(kwargs)))
    example = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
    with tqdm(total=4, desc=f"export {path.name}", disable=not progress) as bar:
        with blame(path, "torch.export", "Export the model's forward with these arguments first"):
            program = to_program(gm, args, kwargs, dynamic_shapes)
        bar.update()
        with blame(path, "torch.onnx", "Replace the operator it names, or export a submodule"):
            model = to_onnx(program, opset)
            written = lower(model, form, _added(gm))
        bar.update()
        with _staging(path) as staged, _beside(model, library, path) as built:
            save = partial(_save, model, staged, path, one_file)
            save()
            bar.update()
            compared = _UNCHECKED
            if check:
                fresh = _fresh(program, args, kwargs, example if written.has_thresholds else None)
                checks = _Checks(staged, path, fresh, reference, written.has_thresholds)
                if built is not None and guard:
                    built = checks.guarded(built, model, save)
                compared, built = checks.run(built)
            size = sum(file.stat().st_size for file in staged.parent.iterdir())
        bar.update()
    if built is not None and library is not None:
        built = replace(built, path=library)
    sizes, seconds = (size, len(model.graph)), time.perf_counter() - start
    return ExportFacts(path, form, opset, *sizes, *written, *compared, built, seconds)


def _fresh(
    program: torch.export.ExportedProgram,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    example: object | None,
) -> list[Probe]:
    """The inputs to compare on; before them `example`, whose thresholds they may never reach."""
    fresh = probes(program, args, kwargs)
    if example is not None:
        fresh.insert(0, replace(fresh[0], leaves=tuple(pytree.tree_leaves(example))))
    return fresh


def _beside(
    model: ir.Model, library: Path | None, path: Path
) -> contextlib.AbstractContextManager[LibraryFacts | None]:
    if library is None:
        return contextlib.nullcontext()
    return staged_library(model, library, path)


def _added(gm: fx.GraphModule) -> frozenset[str]:
    """Names of the tensors that passes put beside the model's own."""
    attributes = gm.graph.find_nodes(op="get_attr")
    return frozenset(str(node.target) for node in attributes if "sparsefx" in node.meta)


def _refuse(gm: fx.GraphModule, path: Path, form: str, opset: int, library: Path | None) -> None:
    if path.is_dir():
        rule = "there is a folder of that name"
        raise ExportFailed(path=path, rule=rule, remedy="Give the name of a file, such as m.onnx")
    if form not in FORMS:
        raise UnknownOption(option="form", value=form, known=", ".join(FORMS))
    if opset == 23:
        raise NotExportable(
            rule="at opset 23 the exporter fuses rotary embeddings for batch 1 only, "
            "so onnxruntime fails at any larger batch",
            remedy="Pass opset=20 or opset=24",
        )
    if opset not in OPSETS:
        raise UnknownOption(option="opset", value=opset, known=", ".join(map(str, OPSETS)))
    for node in gm.graph.nodes:
        if node.target in MASKED_OPS:
            raise NotExportable(
                rule=f"node {node.name} still applies a mask at run time",
                remedy="Run the FoldMasks pass first",
            )
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dtype is torch.bfloat16:
            raise NotExportable(
                rule=f"{node.target if node.op == 'get_attr' else node.name} is bfloat16, "
                "and onnxruntime has no bfloat16 matrix product on CPU",
                remedy="Convert the model with .float() or .half()",
            )
    if library is not None:
        refuse(library, path, form)


@dataclass(frozen=True)
class _Checks:
    """The comparisons of a written file with PyTorch. They raise ExportFailed."""

    staged: Path
    path: Path
    fresh: Sequence[Probe]
    reference: Callable[..., object]
    has_thresholds: bool

    def run(self, built: LibraryFacts | None) -> tuple[_Compared, LibraryFacts | None]:
        """What the stock runtime shows, and `built` with what it shows and gains."""
        with blame(self.path, "onnx.checker", "Please report this model"):
            check_file(self.staged)
        stock = self._session()
        shapes = tuple(probe.shapes for probe in self.fresh)
        compared = self._worst(stock, "onnxruntime"), shapes
        if built is None:
            return compared, None
        ours = self._session(built.path)
        worst = self._worst(ours, "onnxruntime with the library")
        stock_ms, library_ms = timed(stock, ours, self.fresh[0])
        facts = replace(built, max_abs_error=worst, stock_ms=stock_ms, library_ms=library_ms)
        return compared, facts

    def guarded(
        self, built: LibraryFacts, model: ir.Model, save: Callable[[], None]
    ) -> LibraryFacts:
        """The library with the nodes that it makes faster alone; the file is saved again so."""
        with blame(self.path, "timing the library", "Pass guard='off', or report this model"):
            slower = losers(model, self.staged, built.path, self.fresh[0])
        if not slower:
            return built
        demote(model, slower)
        save()
        weights = frozenset(slower.values())
        some = weights & taken(model)
        return replace(built, slower=weights - some, partly=some)

    def _session(self, library: Path | None = None) -> onnxruntime.InferenceSession:
        what = "the file" if library is None else "the file with the library"
        with blame(self.path, f"onnxruntime cannot load {what}", "Please report this model"):
            return session(self.staged, library)

    def _worst(self, runtime: onnxruntime.InferenceSession, who: str) -> float:
        worst = 0.0
        for probe in self.fresh:
            where = f"at input shapes {probe.shapes}"
            remedy = "Narrow dynamic_shapes to sizes that the model takes, or report this model"
            with blame(self.path, f"the comparison of {who} with PyTorch {where}", remedy):
                found = difference(runtime, self.reference, probe, self.has_thresholds)
            if not found.passes:
                raise ExportFailed(
                    path=self.path,
                    rule=f"{who} and PyTorch differ by {found.absolute:.3g} {where}, "
                    f"at most {found.allowed:.3g} is rounding",
                    remedy="Is `reference` the model that was exported? If so, please report it",
                )
            worst = max(worst, found.absolute)
        return worst


def _save(model: ir.Model, staged: Path, path: Path, one_file: int) -> None:
    tensors = (value.const_value for value in model.graph.initializers.values())
    weights = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    external = f"{staged.name}.data" if weights > one_file else None
    with blame(path, "writing it", "Is there enough disk space?"):
        ir.save(model, staged, external_data=external)


@contextlib.contextmanager
def _staging(path: Path) -> Iterator[Path]:
    """A path of the same name in a temporary folder beside `path`; what is there moves on success.

    The name is the same because the model refers to its data file by name; the data goes first, so
    that a model is never without it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        yield Path(folder) / path.name
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
            file.replace(path.parent / file.name)


@contextlib.contextmanager
def blame(path: Path, step: str, remedy: str) -> Iterator[None]:
    """Turns whatever a foreign library raises in `step` into ExportFailed, which names the step."""
    try:
        yield
    except SparseFXError:
        raise
    except Exception as error:  # torch.export, torch.onnx, onnx and onnxruntime raise anything
        root: BaseException = error
        while root.__cause__ is not None:  # torch.onnx names the operator only in the first error
            root = root.__cause__
        reason = (str(root).strip() or repr(root)).splitlines()[0]
        rule = f"{step}: {type(root).__name__}: {reason}"
        raise ExportFailed(path=path, rule=rule, remedy=remedy) from error
