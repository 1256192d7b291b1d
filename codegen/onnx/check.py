"""Does the file compute what PyTorch computes? onnx.checker, then onnxruntime on fresh inputs."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx.checker
import onnxruntime
import sympy
import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

# Largest |onnx - torch| over the largest |torch|, by dtype.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2}
# Where scores are compared with thresholds, one within rounding of its threshold may fall on either
# side, which changes its row by more than rounding: |onnx - torch| over |torch|, in the 2-norm.
FLIPS = 1e-3
_FLOOR = 1e-2  # outputs smaller than this are compared absolutely


@dataclass(frozen=True)
class Probe:
    """One set of fresh inputs. `leaves`: flat (args, kwargs); `names`: their ONNX input names."""

    names: tuple[str, ...]
    leaves: tuple[object, ...]
    spec: pytree.TreeSpec

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each tensor input by name."""
        return {name: tuple(leaf.shape) for name, leaf in self._tensors()}

    @property
    def feed(self) -> dict[str, np.ndarray]:
        """The inputs as onnxruntime takes them."""
        return {name: leaf.cpu().numpy() for name, leaf in self._tensors()}

    def run(self, model: Callable[..., object], floats: torch.dtype | None = None) -> list[Tensor]:
        """The tensors that `model` returns, flat. It gets clones: it may write to its inputs.

        floats: what floating-point inputs are cast to; None leaves them.
        """
        leaves = [_copy(leaf, floats) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        with torch.no_grad():
            result = model(*args, **kwargs)
        return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        pairs = zip(self.names, self.leaves, strict=True)
        return ((name, leaf) for name, leaf in pairs if isinstance(leaf, Tensor))


@dataclass(frozen=True)
class Difference:
    """How far onnxruntime is from PyTorch: the largest |onnx - torch| and its bound."""

    absolute: float
    allowed: float

    @property
    def passes(self) -> bool:
        """Whether it is within the bound (NaN is not)."""
        return self.absolute <= self.allowed


def check_file(path: Path) -> None:
    """Raises what onnx.checker raises, shape inference included."""
    onnx.checker.check_model(str(path), full_check=True)


def session(
    path: Path, library: Path | None = None, options: onnxruntime.SessionOptions | None = None
) -> onnxruntime.InferenceSession:
    """The file in onnxruntime on the CPU: a stock one, or with a library of kernels."""
    options = options or onnxruntime.SessionOptions()
    if library is not None:
        options.register_custom_ops_library(str(library.absolute()))
    options.log_severity_level = 3  # errors only: a warning for each shape it cannot infer
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def difference(
    runtime: onnxruntime.InferenceSession,
    reference: Callable[..., object],
    probe: Probe,
    has_thresholds: bool = False,
) -> Difference:
    """onnxruntime against PyTorch on one probe. Raises ValueError if the outputs do not pair up.

    has_thresholds: whether the model compares scores with thresholds; then FLIPS passes, too.
    """
    expected = probe.run(reference)
    wanted = {value.name for value in runtime.get_inputs()}
    feed = {name: array for name, array in probe.feed.items() if name in wanted}
    found = [torch.from_numpy(array) for array in runtime.run(None, feed)]
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        raise ValueError(
            f"onnxruntime returns shapes {[tuple(tensor.shape) for tensor in found]}, "
            f"PyTorch {[tuple(tensor.shape) for tensor in expected]}"
        )
    pairs = [_difference(a, b, has_thresholds) for a, b in zip(found, expected, strict=True)]
    half = any(tensor.dtype is torch.float16 for tensor in expected)
    if half and isinstance(reference, nn.Module) and not all(pair.passes for pair in pairs):
        exact = probe.run(copy.deepcopy(reference).float(), torch.float32)
        pairs = [_arbitrate(*each) for each in zip(found, expected, exact, strict=True)]
    return max(pairs, key=_excess, default=Difference(0.0, 0.0))


def _copy(leaf: Tensor, floats: torch.dtype | None) -> Tensor:
    copied = leaf.clone()
    return copied.to(floats) if floats is not None and leaf.is_floating_point() else copied


def _arbitrate(found: Tensor, expected: Tensor, exact: Tensor) -> Difference:
    """fp16 is judged by fp32: onnxruntime may be as far from it as twice PyTorch's own fp16 is.

    onnxruntime computes most of fp16 in fp32, and PyTorch's rounding grows in deep models.
    """
    ours, theirs = _difference(found, exact), _difference(expected, exact)
    allowed = _difference(found, expected).allowed
    return Difference(ours.absolute, max(allowed, 2 * theirs.absolute))


def _excess(pair: Difference) -> float:
    """Grows with the error relative to its bound; NaN is worst."""
    ratio = pair.absolute / pair.allowed if pair.allowed else pair.absolute
    return float("inf") if np.isnan(ratio) else ratio


def _difference(found: Tensor, expected: Tensor, has_thresholds: bool = False) -> Difference:
    ours, theirs = (tensor.detach().cpu().double().numpy() for tensor in (found, expected))
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))  # equal infinities, both NaN
    gap = np.abs(np.where(same, 0.0, ours) - np.where(same, 0.0, theirs))
    finite = np.abs(theirs[np.isfinite(theirs)])
    scale = max(float(finite.max()) if finite.size else 0.0, _FLOOR)
    tolerance = TOLERANCE.get(expected.dtype, 0.0)  # integers and bools: equal
    absolute, allowed = float(gap.max()) if gap.size else 0.0, tolerance * scale
    if has_thresholds and tolerance:
        few = float(np.linalg.norm(gap)) <= max(FLIPS, tolerance) * float(np.linalg.norm(finite))
        allowed = max(allowed, absolute) if few else allowed
    return Difference(absolute, allowed)


def probes(
    program: torch.export.ExportedProgram, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> list[Probe]:
    """Fresh inputs at the example's sizes and, where sizes are dynamic, at two others.

    Floats are normal (and positive if the example is nowhere negative); integers lie in the
    example's range; bools, and integers that are only 0 and 1 (padding masks), are the example's,
    stretched, so that no row of a mask becomes empty, and padded on the right (`_padded_right`).
    """
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    signature = program.graph_signature
    names = tuple(
        item.arg.name for item in signature.input_specs if item.kind is InputKind.USER_INPUT
    )
    fakes = {node.name: node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")}
    symbolic = [_shape(fakes.get(name)) for name in names]
    made = []
    for i, values in enumerate(_sizes(program, symbolic, leaves)):
        generator = torch.Generator().manual_seed(i)
        fresh = tuple(
            _fresh(leaf, [int(dim.subs(values)) for dim in shape], generator)
            if isinstance(leaf, Tensor)
            else leaf
            for leaf, shape in zip(leaves, symbolic, strict=True)
        )
        made.append(Probe(names, fresh, spec))
    return made


def _shape(fake: object) -> list[sympy.Expr]:
    if not isinstance(fake, Tensor):
        return []
    return [_expression(dim) for dim in fake.shape]


def _expression(dim: int | torch.SymInt) -> sympy.Expr:
    return dim.node.expr if isinstance(dim, torch.SymInt) else sympy.Integer(dim)


def _sizes(
    program: torch.export.ExportedProgram,
    symbolic: list[list[sympy.Expr]],
    leaves: list[object],
) -> list[dict[sympy.Symbol, int]]:
    """Values of the size symbols: the example's, larger, smaller.

    Symbols that are equal in the example stay equal: torch.export often finds no constraint between
    the batch of `input_ids` and that of its mask. Others move by different steps.
    """
    example: dict[sympy.Symbol, int] = {}
    for shape, leaf in zip(symbolic, leaves, strict=True):
        for dim, size in zip(shape, leaf.shape if isinstance(leaf, Tensor) else (), strict=True):
            for symbol in dim.free_symbols:
                if symbol not in example and len(dim.free_symbols) == 1:
                    example[symbol] = int(sympy.solve(dim - size, symbol)[0])
    if not example:
        return [{}]
    larger, smaller = dict(example), dict(example)
    for step, now in enumerate(sorted(set(example.values())), start=1):
        equal = [symbol for symbol, size in example.items() if size == now]
        ranges = [_range(program, symbol) for symbol in equal]
        low, high = max(low for low, _ in ranges), min(high for _, high in ranges)
        larger.update(dict.fromkeys(equal, min(high, now + 2 + step)))
        other = max(low, now - step) if now > low else min(high, now + 4 + 2 * step)
        smaller.update(dict.fromkeys(equal, other))
    return [example, larger, smaller]


def _range(program: torch.export.ExportedProgram, symbol: sympy.Symbol) -> tuple[int, int]:
    """Legal sizes; unbounded above is a large number. Size 0 is never tried."""
    limits = program.range_constraints.get(symbol)
    if limits is None:
        return 1, 2**31
    high = int(limits.upper) if limits.upper.is_Integer else 2**31
    return max(1, int(limits.lower)), high


def _fresh(example: Tensor, shape: list[int], generator: torch.Generator) -> Tensor:
    if example.is_floating_point():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if example.numel() and not bool((example < 0).any()):
            noise = noise.abs()
        return noise.to(example)
    if not example.numel():
        return example.new_zeros(shape)
    low, high = int(example.min()), int(example.max())
    if example.dtype is torch.bool or (low >= 0 and high <= 1):
        return _padded_right(_stretch(example, shape))
    return torch.randint(low, high + 1, shape, generator=generator).to(example)


def _stretch(example: Tensor, shape: list[int]) -> Tensor:
    """Nearest-neighbour resize in every dimension, in storage of its own."""
    for dim, size in enumerate(shape):
        old = example.shape[dim]
        index = torch.arange(size, device=example.device) * old // max(size, 1)
        example = example.index_select(dim, index)
    return example.clone()


def _padded_right(mask: Tensor) -> Tensor:
    """Rows of a [batch, length] mask that begin with 0, turned round.

    Behind left padding a causal query sees no key at all, and what attention over nothing gives is
    not defined: PyTorch's own kernels differ there too.
    """
    if mask.dim() != 2 or not mask.numel():
        return mask
    return torch.where(mask[:, :1] == 0, mask.flip(-1), mask)
