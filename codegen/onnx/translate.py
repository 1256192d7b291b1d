"""Graph module -> ONNX model whose linears and sparse attentions are still whole, one node each.

torch.onnx translates everything but those. They become nodes of our domain, which its
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
from sparsefx.attention.operators import BLOCK as BLOCK_OP
from sparsefx.attention.operators import SKIP_SOFTMAX as SKIP_SOFTMAX_OP
from sparsefx.attention.operators import THETA as THETA_OP
from sparsefx.codegen.onnx.attention_functions import BLOCK, SKIP_SOFTMAX, THETA
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
    """The ONNX model of `program`, its linears and sparse attentions in domain "sparsefx".

    Nodes Linear, NMLinear, BitmapLinear, SkipSoftmaxAttention, ThetaAttention, BlockAttention;
    inputs of all but Linear are those of the dialect operators.
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
        SKIP_SOFTMAX_OP: _skip_softmax,
        THETA_OP: _theta,
        BLOCK_OP: _block,
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


def _skip_softmax(
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    mask: ir.Value | None,
    prefill: ir.Value,
    decode: ir.Value,
    is_causal: bool,
    scale: float,
    window: int,
    block_q: int,
    block_k: int,
    order: str,
) -> object:
    return _node(
        SKIP_SOFTMAX,
        (q, k, v, mask, prefill, decode),
        is_causal=int(is_causal),
        scale=scale,
        window=window,
        block_q=block_q,
        block_k=block_k,
        order=order,
    )


def _theta(
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    mask: ir.Value | None,
    lengths: ir.Value,
    theta: ir.Value,
    lost: ir.Value | None,
    is_causal: bool,
    scale: float,
    window: int,
    topk: int,
    placement: str,
    denominator: str,
    v_mean: bool,
) -> object:
    return _node(
        THETA,
        (q, k, v, mask, lengths, theta, lost),
        is_causal=int(is_causal),
        scale=scale,
        window=window,
        topk=topk,
        placement=placement,
        denominator=denominator,
        v_mean=int(v_mean),
    )


def _block(
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    mask: ir.Value | None,
    keep: ir.Value,
    is_causal: bool,
    scale: float,
    window: int,
    block_q: int,
    block_k: int,
) -> object:
    return _node(
        BLOCK,
        (q, k, v, mask, keep),
        is_causal=int(is_causal),
        scale=scale,
        window=window,
        block_q=block_q,
        block_k=block_k,
    )


def _node(name: str, inputs: Sequence[ir.Value | None], **attributes: float | str) -> object:
    """Records a node of our domain.

    Its schema is made for this call, because the recorder has no variadic inputs; nothing is
    registered.
    """
    numbers = range(len(inputs))
    kinds = {
        int: OpSchema.AttrType.INT,
        float: OpSchema.AttrType.FLOAT,
        str: OpSchema.AttrType.STRING,
    }
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


_KINDS = ("float", "float16", "double", "uint8", "int32", "int64", "bool")
_TYPES = [f"tensor({kind})" for kind in _KINDS]


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
