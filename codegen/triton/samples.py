"""Random linears of a variant, on the CPU: what the ahead-of-time compiler is given to launch."""

import torch
from torch import Tensor

from sparsefx.codegen.triton import tiles
from sparsefx.codegen.triton.form import Form, Packed, Problem
from sparsefx.codegen.triton.variant import Variant
from sparsefx.epilogue import BINARY, features
from sparsefx.patterns import NM, Block, Pattern, Unstructured
from sparsefx.quantise import rounded

DENSITY = 0.4


def problem(variant: Variant, form: Form, rows: int, out: int, in_features: int) -> Problem:
    """One call with these sizes, stored as the kernel wants it."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(variant.dtype)

    operands = [int(step.operand or 0) for step in variant.steps if step.op in BINARY]
    width = features(out, variant.epilogue)
    packed, _ = canonical(variant, form.layout, random(out, in_features))
    return Problem(
        x=random(rows, in_features),
        packed=form.arrange(variant, packed, in_features),
        bias=random(out) if variant.has_bias else None,
        extras=tuple(random(rows, width) for _ in range(max(operands, default=-1) + 1)),
        y=random(rows, width),
        out_features=out,
    )


def canonical(variant: Variant, layout: str, weight: Tensor) -> tuple[Packed, Tensor]:
    """`weight` [out, in] pruned and stored as `sparsefx.packing` has it, and as it is then."""
    rows, columns = variant.block
    patterns: dict[str, Pattern] = {"bitmap": Unstructured(1 - DENSITY)}
    if layout == "nm":
        patterns["nm"] = NM(variant.n, variant.m)
    if layout == "block":
        patterns["block"] = Block(rows, columns, 1 - DENSITY)
    weight = weight * patterns[layout].keep(weight.abs())
    packing = tiles.packing(variant, layout)
    if variant.values:
        weight = rounded(weight, variant.values, packing.tile(weight.shape[1]))
    return packing.pack(weight), weight
