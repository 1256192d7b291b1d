"""sparsefx_rows::linear: the rows of each call choose which kernel runs, or dense.

The plain meaning for every device; on the CPU, codegen/cpp/operator.py is in front of it.

A weight serves decoding (few rows) and prompts (many) in one graph. The choice is a look into a
short table inside of one operator: no graph break, no guard, no recompilation.
"""

import functools
import json
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload

from sparsefx.ops import linear_output
from sparsefx.packing import Packing

SCHEMA = (
    "linear(Tensor x, Tensor[] packed, Tensor? weight, Tensor? bias, Tensor[] extras, str routes, "
    "int features) -> Tensor"
)
_LIBRARY = torch.library.Library("sparsefx_rows", "DEF")
_LIBRARY.define(SCHEMA)


@dataclass(frozen=True)
class Pick:
    """A kernel that a range may run: where the number of rows is a multiple of `multiple`.

    op: the name of its operator, as in "sparsefx_cpp::linear"; tensors: which of `packed` it reads.
    """

    op: str
    handle: str
    tensors: tuple[int, ...]
    multiple: int = 1


@dataclass(frozen=True)
class Route:
    """From `first` rows on, up to the next route: the first pick that fits, or else dense."""

    first: int
    picks: tuple[Pick, ...]


@dataclass(frozen=True)
class Dense:
    """Where rows that no pick fits find the dense weight.

    As the operator's `weight`, stored [in, out] if `transposed`; or, where there is a `packing`,
    unpacked for the call out of those of its `tensors`.
    """

    transposed: bool = False
    packing: Packing | None = None
    tensors: tuple[int, ...] = ()


@dataclass(frozen=True)
class Routes:
    """Routes in ascending order, and the dense weight.

    Its text is read by `_parsed`, and word for word by codegen/cpp/templates/operator_routes.h.
    """

    routes: tuple[Route, ...]
    dense: Dense = Dense()

    def __str__(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))


_Taken = tuple[OpOverload, str, tuple[int, ...], int]
"""A pick whose operator is found: operator, handle, tensors, multiple."""


class _Parsed(NamedTuple):
    """What a call needs of the routes: where each begins, its picks, the dense weight."""

    firsts: list[int]
    picks: list[list[_Taken]]
    dense: Dense


@functools.cache
def _parsed(text: str) -> _Parsed:
    given = json.loads(text)
    firsts = [route["first"] for route in given["routes"]]
    picks = [[_taken(pick) for pick in route["picks"]] for route in given["routes"]]
    dense, stored = given["dense"], given["dense"]["packing"]
    packing = Packing(**{**stored, "block": tuple(stored["block"])}) if stored else None
    return _Parsed(firsts, picks, Dense(dense["transposed"], packing, tuple(dense["tensors"])))


def _taken(pick: dict[str, object]) -> _Taken:
    namespace, _, name = str(pick["op"]).partition("::")
    operator = getattr(getattr(torch.ops, namespace), name).default
    places: list[int] = pick["tensors"]  # type: ignore[assignment]  # as Routes wrote it
    return operator, str(pick["handle"]), tuple(places), int(str(pick["multiple"]))


def linear(
    x: Tensor,
    packed: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    extras: Sequence[Tensor],
    routes: str,
    features: int,
) -> Tensor:
    """x W^T + bias by the kernel, or dense, that `routes` (str of a Routes) names for x's rows.

    x [..., in]; packed: the stored tensors of all picks; weight: the dense one, read where no pick
    fits and `routes` do not say to unpack it; bias [out]; extras: operands of an epilogue, which
    only picks know. Returns [..., features], contiguous, x's dtype.
    """
    firsts, picks, dense = _parsed(routes)
    rows = math.prod(x.shape[:-1])
    for operator, handle, tensors, multiple in picks[max(0, bisect_right(firsts, rows) - 1)]:
        if rows % multiple == 0:
            stored = [packed[place] for place in tensors]
            result: Tensor = operator(x, stored, bias, extras, handle, features)
            return result
    assert not extras  # lowering leaves no epilogue to dense ranges
    if dense.packing is not None:
        stored = [packed[place] for place in dense.tensors]
        return F.linear(x, dense.packing.unpack(stored, x.shape[-1]), bias)
    assert weight is not None
    return F.linear(x, weight.t() if dense.transposed else weight, bias)


_LIBRARY.impl("linear", linear, "CompositeExplicitAutograd")
torch.library.register_fake(
    "sparsefx_rows::linear",
    lambda x, packed, weight, bias, extras, routes, features: linear_output(x, features),
    lib=_LIBRARY,
)


def _no_choice() -> float:
    return 0.0


def _nothing(unpack: Callable[[], Tensor]) -> float:
    return 0.0


@dataclass(frozen=True)
class Costs:
    """What a choice costs: microseconds that choosing by rows adds to each call, and a clock for
    unpacking, where a dense product would have to unpack its weight first.

    The first is asked once kernels are built: a target may come with a faster way to choose."""

    dispatch_us: Callable[[], float] = _no_choice
    unpack_us: Callable[[Callable[[], Tensor]], float] = _nothing


NO_COSTS = Costs()


@functools.cache
def dispatch_us(device_type: str) -> float:
    """Microseconds that the operator adds to a call on the CPU; the GPU's clock sees none.

    Found as the difference of two tiny products, the least of several runs of each.
    """
    if device_type != "cpu":
        return 0.0
    x, weight = torch.ones(1, 8), torch.ones(8, 8)
    routes = str(Routes((Route(1, ()), Route(9, (Pick("sparsefx_rows::linear", "", ()),)))))
    operator = torch.ops.sparsefx_rows.linear.default
    through = _least_us(lambda: operator(x, [weight, weight], weight, None, [], routes, 8))
    return max(0.0, through - _least_us(lambda: F.linear(x, weight)))


@torch.no_grad()
def _least_us(run: Callable[[], Tensor], calls: int = 50, batches: int = 20) -> float:
    times = []
    for _ in range(batches):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        times.append((time.perf_counter() - start) / calls)
    return min(times) * 1e6
