"""What a call of a packed linear costs on the CPU beside its arithmetic: a weight of 16 x 64.

    python benchmarks/dispatch.py [--seconds 20] [--json benchmarks/results/NAME.json]

The operators as graphs call them, which need no Python where their C++ half is built; the same
operators by their Python halves; and torch's dense product, also as an operator. Eager, and in a
graph of Inductor, as what one more call adds to a graph of ten. One thread, in turns; medians and
least of the seconds that the process had the processor. What else runs on a machine still takes
caches away: the least is closest to a machine of one's own.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `benchmarks`, when run as a script

from benchmarks.record import machine, write
from benchmarks.turns import Call, Side, in_turns, median
from sparsefx import by_rows
from sparsefx.by_rows import Pick, Route, Routes
from sparsefx.codegen.cpp import CppLinear, call
from sparsefx.formats import pack_nm
from sparsefx.target import LINEAR_SCHEMA, LinearSpec, Lowering

OUT, WIDTH, REPEATS = 16, 64, 200
FEW, MANY = 10, 50  # calls in a graph

_LIBRARY = torch.library.Library("sparsefx_python", "DEF")
_LIBRARY.define(LINEAR_SCHEMA)
_LIBRARY.define(by_rows.SCHEMA.replace("linear(", "by_rows("))
for _name, _half in (("linear", call.linear), ("by_rows", by_rows.linear)):
    _LIBRARY.impl(_name, _half, "CPU")
    torch.library.register_fake(
        f"sparsefx_python::{_name}",
        lambda x, *operands: x.new_empty((*x.shape[:-1], operands[-1])),
        lib=_LIBRARY,
    )

Product = Callable[[Tensor, int], Tensor]
"""Of x and the weight of that number."""
Figures = dict[str, dict[str, float]]
"""Microseconds of each way: the median and the least."""


def main(arguments: list[str] | None = None) -> None:
    """Prints the microseconds of each way; `--json` keeps them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20, help="for each table")
    parser.add_argument("--json", type=Path, help="keep machine, versions and figures here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(machine())
    with torch.no_grad():
        products = _products()
        results: list[dict[str, object]] = [
            {"where": where, **measure(products, options.seconds)}
            for where, measure in (("eager", _eager), ("in a graph of Inductor", _in_a_graph))
        ]
    for result in results:
        for key, value in result.items():
            print(key, value)
    if options.json:
        write(options.json, {"weight": [OUT, WIDTH], "repeats": REPEATS}, results)


def _processor_time(run: Call) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def _products() -> dict[str, Product]:
    weights = [torch.randn(OUT, WIDTH) * (torch.arange(WIDTH) % 4 < 2) for _ in range(MANY)]
    lowered = [_lowered(weight) for weight in weights]
    stored = [list(each.packed) for each in lowered]
    handle = lowered[0].handle
    picks = (Pick("sparsefx_cpp::linear", handle, tuple(range(len(stored[0])))),)
    routes = str(Routes((Route(1, picks), Route(9, ()))))
    cpp, rows = torch.ops.sparsefx_cpp.linear.default, torch.ops.sparsefx_rows.linear.default
    python, python_rows = (
        getattr(torch.ops.sparsefx_python, name).default for name in ("linear", "by_rows")
    )
    return {
        "dense": lambda x, i: F.linear(x, weights[i]),
        "dense as an operator": lambda x, i: torch.ops.aten.linear.default(x, weights[i]),
        "kernel": lambda x, i: cpp(x, stored[i], None, [], handle, OUT),
        "kernel by Python": lambda x, i: python(x, stored[i], None, [], handle, OUT),
        "by rows": lambda x, i: rows(x, stored[i], weights[i], None, [], routes, OUT),
        "by rows by Python": lambda x, i: python_rows(
            x, stored[i], weights[i], None, [], routes, OUT
        ),
    }


def _lowered(weight: Tensor) -> Lowering:
    spec = LinearSpec("nm", OUT, WIDTH, 2, 4, 0.5, weight.dtype, False, "", 1, False)
    return CppLinear("nm").lower(spec, pack_nm(weight, 2, 4))


def _eager(products: Mapping[str, Product], seconds: float) -> Figures:
    """Of a call."""
    x = torch.randn(1, WIDTH)

    def side(name: str, product: Product) -> Side:
        def run() -> None:
            for number in range(REPEATS):
                product(x, number % MANY)

        return Side(name, [run], REPEATS)

    sides = [side(*each) for each in products.items()]
    times = in_turns(sides, seconds, _processor_time)
    return {name: _figures(taken) for name, taken in times.items()}


def _in_a_graph(products: Mapping[str, Product], seconds: float) -> Figures:
    """Of what a call adds to a compiled graph of FEW."""
    x = torch.randn(1, WIDTH)

    def side(name: str, product: Product, count: int) -> Side:
        graph = make_fx(lambda x: [product(x, number) for number in range(count)])(x)
        fast = torch._inductor.compile(graph, [x])
        return Side(name, [lambda: [fast(x) for _ in range(REPEATS // FEW)]], REPEATS // FEW)

    sides = [
        side(f"{name} {count}", product, count)
        for name, product in products.items()
        for count in (FEW, MANY)
    ]
    times = in_turns(sides, seconds, _processor_time)
    return {
        name: {
            key: round((many - few) / (MANY - FEW), 2)
            for (key, few), many in zip(
                _figures(times[f"{name} {FEW}"]).items(),
                _figures(times[f"{name} {MANY}"]).values(),
                strict=True,
            )
        }
        for name in products
    }


def _figures(times: Sequence[float]) -> dict[str, float]:
    return {"median": round(median(times), 2), "least": round(1e6 * min(times), 2)}


if __name__ == "__main__":
    main()
