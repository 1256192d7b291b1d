"""Is mma.sp given its operands in the right order? The first thing to ask on a new GPU.

    python benchmarks/fragment_order.py           on a CUDA machine: the kernels as they are
    python benchmarks/fragment_order.py --cpu     anywhere: in the tests' machine for inline PTX

Each line is a pattern, kind of values, way to read x, and number of rows; the error is the largest
difference from float64 over the largest result. The guard asks the same before it chooses, so a
wrong order would cost speed, never a result.
"""

import argparse
import itertools
import os
import sys
from pathlib import Path

if "--cpu" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `tests`, when run as a script

from sparsefx.codegen.triton import TritonLinear, samples
from sparsefx.codegen.triton.variant import Variant
from sparsefx.target import LinearSpec
from tests.interp_bf16 import repaired
from tests.ptx_machine import running

KINDS = (((2, 4), ""), ((1, 4), ""), ((2, 8), ""), ((2, 4), "int8"), ((2, 4), "int4"))
WAYS = (
    (("deep", 2), ("direct", 1)),
    (("slabs", 2), ("tall", 2), ("deep", 1), ("split", 2), ("direct", 0)),
)
LIMIT = 0.01


def error(
    pattern: tuple[int, int], values: str, way: tuple[tuple[str, int], ...], rows: int, device: str
) -> float:
    """Largest difference from float64, over the largest result, at 64 x 520."""
    n, m = pattern
    group = 128 if values == "int4" else 0
    size = (64, 520, n, m, n / m, torch.bfloat16, False, "", rows, False)
    spec = LinearSpec("nm", *size, values=values, group=group)
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(64, 520, generator=generator).bfloat16()
    packed, weight = samples.canonical(Variant.of("mma_sp", spec), "nm", weight)
    lowering = TritonLinear("mma_sp", way).lower(spec, packed)
    x = torch.randn(rows, 520, generator=generator).bfloat16()
    stored = [tensor.to(device) for tensor in lowering.packed]
    expected = x.double() @ weight.double().t()
    if device == "cpu":
        from sparsefx.codegen.triton import launch

        with running(), repaired():
            result = launch.linear(lowering.handle, x, stored, 64, None, ())
    else:
        result = lowering.run(x.to(device), packed=stored).cpu()
    return float((result.double() - expected).abs().max() / expected.abs().max())


def main() -> None:
    """Prints a line for each case; ends with 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cpu", action="store_true", help="in a machine for inline PTX")
    cpu = parser.parse_args().cpu
    if not cpu and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: pass --cpu")
    print("the tests' machine for inline PTX" if cpu else torch.cuda.get_device_name())
    right = True
    for (pattern, values), way, rows in itertools.product(KINDS, WAYS, (1, 13, 64)):
        found = error(pattern, values, way, rows, "cpu" if cpu else "cuda")
        right &= found < LIMIT
        how = "direct" if len(way) == 2 else "ordered"
        name = f"{pattern[0]}:{pattern[1]} {values or 'bfloat16':8} {how:7}"
        print(f"{name} {rows:2} rows  {found:.1e}{'' if found < LIMIT else '  WRONG'}", flush=True)
    if not right:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
