"""Never slower: a kernel is chosen only if it beats dense, by measurement or by the roofline.

Dense is timed without the epilogue, because Inductor fuses that into the dense product: the kernel,
which does the epilogue too, must beat a lower bound of the dense cost. docs/guard.md has the rules.
"""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload

from sparsefx import devices, diskcache, epilogue, timing
from sparsefx.cost import linear_cost
from sparsefx.kernel_check import attempt, compare
from sparsefx.quantise import quantised_rows
from sparsefx.target import LinearSpec, Lowering
from sparsefx.tuned import Tuned

# A kernel wins if it takes less than this share of the dense time: the medians of two equal kernels
# differ by up to some 2 % between runs, and a tie is not worth a generated kernel.
MARGIN = 0.97

# Work of one timed call, in FLOP. Beyond it both times are proportional to the rows, so fewer rows
# are run and the times scaled up.
FLOPS_LIMIT = {"cpu": 4 * 10**9, "cuda": 10**12}
ROWS_FLOOR = 32

PROTOCOL = "4"  # counts changes in how this measures or kernels are called; older ones are not read
_SEED = 0


@dataclass(frozen=True)
class Verdict:
    """A kernel against dense: times in microseconds and how they were found.

    how: "measured" or "modelled"; error: largest |sparse - dense| over largest |dense|; bound: what
    sparse / dense stays below with 95 % confidence; both None if modelled. fault: why the kernel
    must not be chosen at any speed, or "".
    """

    dense_us: float
    sparse_us: float
    how: str
    error: float | None = None
    bound: float | None = None
    fault: str = ""

    @property
    def ratio(self) -> float:
        """sparse_us / dense_us; below 1 the kernel is faster."""
        return self.sparse_us / self.dense_us

    @property
    def wins(self) -> bool:
        """Whether the kernel is to be chosen: right, and faster than dense beyond noise."""
        return not self.fault and max(self.ratio, self.bound or 0.0) < MARGIN

    def against(self, extra_us: float) -> "Verdict":
        """The same verdict where dense takes so many microseconds longer."""
        if not extra_us:
            return self
        share = self.dense_us / (self.dense_us + extra_us)
        bound = None if self.bound is None else self.bound * share
        return replace(self, dense_us=self.dense_us + extra_us, bound=bound)

    @property
    def reason(self) -> str:
        """Why it does not win, "" if it does; free of numbers, so that a report can count it."""
        if self.wins:
            return ""
        slower = f"the sparse kernel is not faster than dense ({self.how})"
        noisy = "the sparse kernel's gain over dense is within the noise (measured)"
        return self.fault or (noisy if self.ratio < MARGIN else slower)


def measure(
    spec: LinearSpec,
    weight: Tensor,
    bias: Tensor | None,
    lowering: Lowering,
    *,
    device: torch.device | str,
    cache: Path,
    tuned: Tuned | None = None,
) -> Verdict:
    """Times `lowering` against dense F.linear on `device`, in about a tenth of a second.

    `weight` [out, in] and `bias` [out] are the dense layer that `lowering` replaces, on `spec.rows`
    rows; where calls may bring others, `ladder.table` asks for several. Each question (spec, kernel
    text, device, versions) is answered once for a `cache` folder; weights whose densities agree to
    two digits share the answer; those in `tuned` come first. Raises KernelRunFailed.
    """
    device = torch.device(device)
    asked, spec = max(1, spec.rows), replace(spec, rows=runnable_rows(spec, device))
    key = _question(spec, lowering, device)
    verdict = answered(key, lambda: _measured(spec, weight, bias, lowering, device), cache, tuned)
    return scaled(verdict, asked / spec.rows)


def is_answered(
    spec: LinearSpec,
    lowering: Lowering,
    *,
    device: torch.device | str,
    cache: Path,
    tuned: Tuned | None = None,
) -> bool:
    """Whether `measure` would find the verdict, not take it."""
    device = torch.device(device)
    spec = replace(spec, rows=runnable_rows(spec, device))
    return _recalled(_question(spec, lowering, device), cache, tuned) is not None


def _question(spec: LinearSpec, lowering: Lowering, device: torch.device) -> dict[str, str]:
    return question(repr(replace(spec, density=round(spec.density, 2))), lowering, device)


def answered(
    key: Mapping[str, str], find: Callable[[], Verdict], cache: Path, tuned: Tuned | None = None
) -> Verdict:
    """The verdict on a question: of `tuned`, this process, the cache, or else that of `find`."""
    verdict = _recalled(key, cache, tuned)
    if verdict is None:
        verdict = find()
        diskcache.remember(cache / "timings", key, asdict(verdict))
        _known(cache)[json.dumps(key, sort_keys=True)] = verdict
    return verdict


def _recalled(key: Mapping[str, str], cache: Path, tuned: Tuned | None) -> Verdict | None:
    known = _known(cache)
    name = json.dumps(key, sort_keys=True)
    if name not in known or (tuned is not None and name not in tuned.asked):
        shipped = None if tuned is None else _read(tuned.find(key))
        verdict = shipped or known.get(name) or _read(diskcache.recall(cache / "timings", key))
        if verdict is not None:
            known[name] = verdict
    return known.get(name)


def model(spec: LinearSpec, device_name: str, *, cache: Path | None = None) -> Verdict:
    """Predicts both times by the roofline of a device that need not be present.

    `device_name` and `cache` as in `devices.named`. The kernel is taken to reach the roofline, so
    the answer is what its format can gain at best.
    """
    return _modelled(spec, devices.named(device_name, cache), max(1, spec.rows))


@functools.lru_cache(maxsize=4096)  # a sum of symbols, asked for again by each equal layer
def _modelled(spec: LinearSpec, device: devices.Device, rows: int) -> Verdict:
    def microseconds(layout: str) -> float:
        sizes = (spec.out_features, spec.in_features, rows, spec.n, spec.m)
        work = linear_cost(
            layout,
            *sizes,
            spec.density,
            spec.dtype,
            block=spec.block,
            values="" if layout == "dense" else spec.values,
            group=spec.group,
        )
        return work.seconds(device) * 1e6

    return Verdict(microseconds("dense"), microseconds(spec.layout), "modelled")


@dataclass(frozen=True)
class _Case:
    """A packed linear beside its dense self, on `rows` random rows of input."""

    spec: LinearSpec
    lowering: Lowering
    weight: Tensor
    bias: Tensor | None
    x: Tensor
    extras: tuple[Tensor, ...]

    def dense(self, weight: Tensor) -> Tensor:
        return F.linear(self.x, weight, self.bias)

    def expected(self) -> Tensor:
        """What the kernel must give before the epilogue; not at the speed of `dense`."""
        if self.spec.values != "int8_dynamic":
            return self.dense(self.weight)
        codes, scales = quantised_rows(self.x)
        product = F.linear(codes, self.weight.double()) * scales
        return (product if self.bias is None else product + self.bias).to(self.spec.dtype)

    def sparse(self, packed: tuple[Tensor, ...]) -> Tensor:
        return self.lowering.run(self.x, self.bias, self.extras, packed)


def _measured(
    spec: LinearSpec,
    weight: Tensor,
    bias: Tensor | None,
    lowering: Lowering,
    device: torch.device,
) -> Verdict:
    weight = weight.detach().to(device)
    bias = None if bias is None else bias.detach().to(device)
    x, extras = inputs(spec, spec.rows, device)
    return _compare(_Case(spec, lowering, weight, bias, x, extras), device)


def runnable_rows(spec: LinearSpec, device: torch.device) -> int:
    """The rows of the spec, or as many as can be run in the time there is."""
    row = 2 * spec.out_features * spec.in_features
    most = max(ROWS_FLOOR, FLOPS_LIMIT[device.type] // max(1, row))
    return min(max(1, spec.rows), most)


def scaled(verdict: Verdict, scale: float) -> Verdict:
    """The same verdict where both take `scale` times as long."""
    if scale == 1:
        return verdict
    return replace(verdict, dense_us=verdict.dense_us * scale, sparse_us=verdict.sparse_us * scale)


def inputs(spec: LinearSpec, rows: int, device: torch.device) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Random x [rows, in] and operands of the epilogue, each time the same."""
    generator = torch.Generator(device).manual_seed(_SEED)  # the global generator is the user's
    steps = epilogue.parse(spec.epilogue)
    operands = [int(step.operand or 0) for step in steps if step.op in epilogue.BINARY]

    def random(features: int) -> Tensor:
        shape = (rows, features)
        return torch.randn(shape, generator=generator, device=device, dtype=spec.dtype)

    features = epilogue.features(spec.out_features, spec.epilogue)
    extras = tuple(random(features) for _ in range(1 + max(operands, default=-1)))
    return random(spec.in_features), extras


@torch.no_grad()
def _compare(case: _Case, device: torch.device) -> Verdict:
    error, fault = _check(case)
    tensors = (case.weight, *case.lowering.packed)
    took = timing.paired(
        lambda copy: case.dense(copy[0]), lambda copy: case.sparse(copy[1:]), tensors, device
    )
    return Verdict(took.first_us, took.second_us, "measured", error, took.bound, fault)


def _check(case: _Case) -> tuple[float | None, str]:
    """The error of the kernel against dense with the epilogue, and its fault or ""."""
    expected = epilogue.apply(case.expected(), case.spec.epilogue, case.extras)
    result = attempt(case.lowering.handle, lambda: case.sparse(case.lowering.packed))
    return compare(result, expected, case.spec.dtype)


class Built(Protocol):
    """A built kernel, as far as a question about it goes."""

    @property
    def op(self) -> OpOverload:
        """The operator that calls it."""
        ...

    @property
    def handle(self) -> str:
        """Its name."""
        ...

    @property
    def text(self) -> str:
        """Its source."""
        ...


def question(spec: str, lowering: Built, device: torch.device) -> dict[str, str]:
    """All that a timing depends on; also what a person reads in the cache file."""
    return {
        "spec": spec,
        "op": str(lowering.op),
        "handle": lowering.handle,
        "kernel": lowering.text,
        **devices.surroundings(device),
        "protocol": PROTOCOL,
    }


@functools.cache
def _known(cache: Path) -> dict[str, Verdict]:
    """The verdicts this process has seen, one dict a cache folder: a memo, never an input."""
    return {}


def known(cache: Path) -> dict[str, dict[str, object]]:
    """All verdicts of this process by the JSON text of their question, as `tuned.write` takes."""
    return {name: asdict(verdict) for name, verdict in _known(cache).items()}


def _read(found: Mapping[str, object] | None) -> Verdict | None:
    """A verdict as it was written; None where a number is missing or is none."""
    if found is None:
        return None
    numbers = (diskcache.number(found.get(name)) for name in ("dense_us", "sparse_us", "bound"))
    dense, sparse, bound = numbers
    fault = found.get("fault")
    if not dense or not sparse or not bound or not isinstance(fault, str):
        return None
    return Verdict(dense, sparse, "measured", diskcache.number(found.get("error")), bound, fault)
