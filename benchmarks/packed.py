"""Packed linears as the product makes them: pruned, packed, lowered by the fastest kernel."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.turns import Clock, Side, wall
from sparsefx import choice
from sparsefx.cost import Cost, linear_cost
from sparsefx.packing import Packing
from sparsefx.patterns import NM, Block, Pattern, Unstructured
from sparsefx.quantise import quantised_rows, rounded
from sparsefx.target import Kernel, LinearSpec, Lowering
from sparsefx.timing import rotating

NO_KERNEL = "no kernel of the target reads this layout"
COPIES = 64  # at most
TRIALS, TRIAL_SECONDS = 5, 0.05  # of each candidate, of which the fastest call counts
TRIAL_ROWS = 512  # of x, at most

PATTERNS: dict[str, Pattern] = {
    "2:4": NM(2, 4),
    "1:4": NM(1, 4),
    "2:8": NM(2, 8),
    "4:8": NM(4, 8),
    "bitmap 50 %": Unstructured(0.5),
    "bitmap 70 %": Unstructured(0.7),
    "bitmap 80 %": Unstructured(0.8),
    "bitmap 90 %": Unstructured(0.9),
    "bitmap 95 %": Unstructured(0.95),
    "block 64x64 80 %": Block(64, 64, 0.8),
    "block 32x32 80 %": Block(32, 32, 0.8),
}
# Largest difference over the largest result, by the dtype of x and y.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Storage:
    """How a weight is stored: a name in PATTERNS, and `values`, `group` of `target.LinearSpec`."""

    pattern: str
    values: str = ""
    group: int = 0

    def __str__(self) -> str:
        return f"{self.pattern} {self.values}".strip()

    @property
    def density(self) -> float:
        """Share of stored values."""
        return 1 - PATTERNS[self.pattern].sparsity

    @property
    def packing(self) -> Packing:
        """The product's own, for weights of the pattern."""
        pattern = PATTERNS[self.pattern]
        return replace(Packing.of(pattern), values=self.values, group=self.group)

    def cost(self, out: int, width: int, rows: int, dtype: torch.dtype) -> Cost:
        """Of a linear: bytes, and flops as if no value of N:M or bitmap were zero."""
        packing = self.packing
        return linear_cost(
            packing.layout, out, width, rows, packing.n, packing.m, self.density, dtype,
            block=packing.block, values=packing.values, group=packing.group,
        )  # fmt: skip

    def prune(self, weight: Tensor) -> Tensor:
        """`weight` [out, in] with the pattern's zeros, its numbers as the values can hold them."""
        kept = weight * PATTERNS[self.pattern].keep(weight.abs().float())
        tile = self.packing.tile(weight.shape[1])
        return rounded(kept, self.values, tile) if self.values else kept


@dataclass(frozen=True)
class Stored:
    """A weight [out, in] pruned (`dense`) and packed (`tensors`)."""

    storage: Storage
    dense: Tensor
    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, storage: Storage, weight: Tensor) -> "Stored":
        """Prunes by magnitude and packs."""
        pruned = storage.prune(weight)
        return cls(storage, pruned, storage.packing.pack(pruned))

    def spec(self, rows: int) -> LinearSpec:
        """Of the linear alone: no bias, no epilogue, one number of rows."""
        packing = self.storage.packing
        return LinearSpec(
            packing.layout, *self.dense.shape, packing.n, packing.m, self.storage.density,
            self.dense.dtype, has_bias=False, epilogue="", rows=rows, rows_vary=False,
            block=packing.block, values=packing.values, group=packing.group,
        )  # fmt: skip

    def first(self, rows: int, kernels: Sequence[Kernel]) -> "tuple[Packed | None, str]":
        """The kernel of first preference for so many rows, untried; and why others are none."""
        reasons = choice.Reasons()
        return next(self._built(rows, kernels, reasons), None), str(reasons) or NO_KERNEL

    def fastest(
        self, x: Tensor, kernels: Sequence[Kernel], clock: Clock = wall
    ) -> "tuple[Packed | None, str]":
        """Of all ways to run x [rows, in] that the product would try; and why others are none."""
        reasons = choice.Reasons()
        tried = [
            (_trial(partial(packed.lowering.run, x[:TRIAL_ROWS]), clock), packed)
            for packed in self._built(x.shape[0], kernels, reasons)
        ]
        best = min(tried, key=lambda pair: pair[0])[1] if tried else None
        return best, str(reasons) or NO_KERNEL

    def _built(
        self, rows: int, kernels: Sequence[Kernel], reasons: choice.Reasons
    ) -> "Iterator[Packed]":
        spec = self.spec(rows)
        fitting = [kernel for kernel in kernels if kernel.layout == spec.layout]
        for kernel in fitting:
            if reason := kernel.accepts(spec):
                reasons.add(kernel, reason)
        for offer in choice.built(choice.proposed(fitting, [spec]), self.tensors, reasons):
            if rows % offer.lowering.multiple:
                continue
            yield Packed(self, spec, offer.kernel.name, offer.lowering)


@dataclass(frozen=True)
class Packed:
    """A packed linear that is ready to run."""

    stored: Stored
    spec: LinearSpec
    kernel: str
    lowering: Lowering

    def error(self, x: Tensor) -> float:
        """Largest difference from float64, over the largest result."""
        exact = x.double()
        if self.spec.values == "int8_dynamic":
            codes, scales = quantised_rows(x)
            exact = codes * scales
        expected = F.linear(exact, self.stored.dense.double())
        difference = self.lowering.run(x).double() - expected
        return float(difference.abs().max() / expected.abs().max())

    def cost(self) -> Cost:
        """As `Storage.cost`."""
        spec = self.spec
        return self.stored.storage.cost(spec.out_features, spec.in_features, spec.rows, spec.dtype)

    def side(self, name: str, x: Tensor) -> Side:
        """Calls on copies of the stored tensors that together exceed the cache."""
        copies = rotating(self.lowering.packed, x.device, COPIES)
        return Side(name, [partial(self.run, x, copy) for copy in copies])

    def run(self, x: Tensor, packed: tuple[Tensor, ...]) -> Tensor:
        """The kernel on a copy of the stored tensors."""
        return self.lowering.run(x, packed=packed)


def _trial(run: Callable[[], object], clock: Clock) -> float:
    run()
    times: list[float] = []
    while len(times) < TRIALS and sum(times) < TRIAL_SECONDS:
        times.append(clock(run))
    return min(times)
