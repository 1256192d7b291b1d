"""Graph module -> ONNX model whose linears are still whole, one node each.

torch.onnx translates everything but the linears. Those become nodes of our domain, which its
optimiser does not look into; lower.py turns them into their final form afterwards. Were a dense
linear translated at once, its weight would be transposed into an anonymous initializer: its name
lost, and a tied weight stored twice.
"""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import onnx_ir as ir
import onnxscript
import torch
from onnx.defs import OpSchema
from torch import fx

import sparsefx.ops  # noqa: F401  # registers torch.ops.sparsefx
from sparsefx.codegen.onnx.functions import DOMAIN, VERSION
from sparsefx.codegen.onnx.simplify import simplify
from sparsefx.graph import DynamicShapes

DENSE_LINEAR = "Linear"


def to_program(
    gm: fx.GraphModule,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    dynamic_shapes: DynamicShapes,
) -> torch.export.ExportedProgram:
    """`gm` as an exported program; its weights are shared, not copied."""
    with torch.no_grad(), _silence():
        return torch.export.export(gm, args, dict(kwargs), dynamic_shapes=dynamic_shapes)


def to_onnx(program: torch.export.ExportedProgram, opset: int) -> ir.Model:
    """The ONNX model of `program`, with nodes Linear, NMLinear, BitmapLinear of domain "sparsefx".

    Inputs of the packed nodes are those of the dialect operators.
    """
    with torch.no_grad(), _silence():
        onnx_program = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            custom_translation_table=_table(),
            optimize=False,  # simplify.py says why
            verbose=False,
        )
        assert onnx_program is not None
        simplify(onnx_program.model)
    return onnx_program.model


def _table() -> dict[Callable[..., object], Callable[..., object]]:
    return {
        torch.ops.aten.linear.default: _linear,
        torch.ops.sparsefx.nm_linear.default: _nm_linear,
        torch.ops.sparsefx.bitmap_linear.default: _bitmap_linear,
    }


def _linear(x: ir.Value, w: ir.Value, b: ir.Value | None = None) -> object:
    return _node(DENSE_LINEAR, (x, w, b))


def _nm_linear(
    x: ir.Value,
    values: ir.Value,
    index: ir.Value,
    bias: ir.Value | None,
    n: int,
    m: int,
    epilogue: str,
    extras: Sequence[ir.Value],
) -> object:
    return _node("NMLinear", (x, values, index, bias, *extras), n=n, m=m, epilogue=epilogue)


def _bitmap_linear(
    x: ir.Value,
    values: ir.Value,
    bits: ir.Value,
    row_ptr: ir.Value,
    bias: ir.Value | None,
    epilogue: str,
    extras: Sequence[ir.Value],
) -> object:
    inputs = (x, values, bits, row_ptr, bias, *extras)
    return _node("BitmapLinear", inputs, epilogue=epilogue)


def _node(name: str, inputs: Sequence[ir.Value | None], **attributes: int | str) -> object:
    """Records a node of our domain.

    Its schema is made for this call, because the recorder has no variadic inputs; nothing is
    registered.
    """
    numbers = range(len(inputs))
    kinds = {int: OpSchema.AttrType.INT, str: OpSchema.AttrType.STRING}
    schema = OpSchema(
        name,
        DOMAIN,
        VERSION,
        inputs=[
            OpSchema.FormalParameter(
                f"in{i}", f"T{i}", param_option=OpSchema.FormalParameterOption.Optional
            )
            for i in numbers
        ],
        outputs=[OpSchema.FormalParameter("y", "T0")],
        type_constraints=[(f"T{i}", _TYPES, "") for i in numbers],
        attributes=[OpSchema.Attribute(key, kinds[type(v)], "") for key, v in attributes.items()],
    )
    opset = onnxscript.values.Opset(DOMAIN, VERSION)
    return onnxscript.values.Op(opset, name, schema)(*inputs, **attributes)


_TYPES = [f"tensor({kind})" for kind in ("float", "float16", "double", "uint8", "int32")]


_TALKERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without what torch.export and torch.onnx warn and log about themselves."""
    loggers = [logging.getLogger(name) for name in _TALKERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
