"""The library that export() writes beside a file: built, checked and timed before it appears."""

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import onnxruntime

from sparsefx.codegen.cpp.build import compiler
from sparsefx.codegen.onnx.check import Probe
from sparsefx.codegen.onnx.ort.build import build_library
from sparsefx.codegen.onnx.ort.wanted import wanted
from sparsefx.errors import ExportFailed, KernelBuildFailed, UnknownOption
from sparsefx.files import replacing

_REMEDY = "Install g++, or leave out the library"
_PAIRS = (3, 30)  # of timed calls, fewest and most
_SECONDS = 1.0  # aim of all timed calls


@dataclass(frozen=True)
class LibraryFacts:
    """What was written beside the file.

    bytes: its size; kernels: how many it holds, over all instruction sets; max_abs_error: largest
    |onnxruntime with the library - PyTorch| over all probes; stock_ms, library_ms: median time of a
    call at the example's shapes without and with it. None where nothing was checked. slower: the
    packed weights that it would not make faster, and so leaves to the stock runtime; partly: those
    that it takes in some of their nodes alone.
    """

    path: Path
    bytes: int
    kernels: int
    max_abs_error: float | None = None
    stock_ms: float | None = None
    library_ms: float | None = None
    slower: frozenset[str] = frozenset()
    partly: frozenset[str] = frozenset()


def refuse(library: Path, path: Path, form: str) -> None:
    """Raises UnknownOption, ExportFailed for what can be known before the export."""
    if form != "functions":
        known = "functions, where there is a library: it implements the nodes of that form"
        raise UnknownOption(option="form", value=form, known=known)
    if library.is_dir() or library.absolute() == path.absolute():
        what = "is a folder" if library.is_dir() else "is the model's own path"
        rule, remedy = f"library {library} {what}", "Give it a path of its own, such as m.so"
        raise ExportFailed(path=path, rule=rule, remedy=remedy)
    if compiler() is None:
        rule = "a library of kernels is compiled, and there is no g++ on PATH"
        raise ExportFailed(path=path, rule=rule, remedy=_REMEDY)


@contextlib.contextmanager
def staged_library(model: ir.Model, library: Path, path: Path) -> Iterator[LibraryFacts]:
    """The library for `model` at a temporary path; it takes its own on success.

    Raises ExportFailed if it cannot be built, NotExportable if it would have nothing to do.
    """
    specs = wanted(model)
    with replacing(library) as temporary:
        try:
            kernels = build_library(specs, temporary)
        except KernelBuildFailed as error:
            rule = f"its library of kernels did not compile: {error.fields['rule']}"
            raise ExportFailed(path=path, rule=rule, remedy=_REMEDY) from error
        yield LibraryFacts(temporary, temporary.stat().st_size, kernels)


def timed(
    stock: onnxruntime.InferenceSession, ours: onnxruntime.InferenceSession, probe: Probe
) -> tuple[float, float]:
    """Median milliseconds of a call without and with the library, called in turns."""
    names = {value.name for value in stock.get_inputs()}
    feed = {name: array for name, array in probe.feed.items() if name in names}

    def run(session: onnxruntime.InferenceSession) -> float:
        start = time.perf_counter()
        session.run(None, feed)
        return 1e3 * (time.perf_counter() - start)

    warm = run(stock) + run(ours)
    fewest, most = _PAIRS
    count = max(fewest, min(most, int(1e3 * _SECONDS / max(warm, 1e-3))))
    pairs = [(run(stock), run(ours)) for _ in range(count)]
    first, second = (statistics.median(times) for times in zip(*pairs, strict=True))
    return first, second
