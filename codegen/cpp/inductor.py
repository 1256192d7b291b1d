"""How Inductor calls packed linears on the CPU: as its own products, into planned memory."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch._inductor import ir
from torch._inductor.codegen.wrapper import PythonWrapperCodegen
from torch._inductor.lowering import fallback_handler, register_lowering
from torch._inductor.virtualized import V
from torch._ops import OpOverload

from sparsefx.codegen.cpp import direct

_MODULE = direct.__name__
Node = ir.TensorBox


class _Direct(ir.ExternKernelOut):
    """A call of `direct.function(name)`, as "sparsefx_name"."""

    def codegen(self, wrapper: PythonWrapperCodegen) -> None:
        called = self.get_kernel_name()
        name = called.removeprefix("sparsefx_")
        wrapper.add_import_once(f"from {_MODULE} import function as sparsefx_function")
        wrapper.add_import_once(f"{called} = sparsefx_function({name!r})")
        super().codegen(wrapper)


@functools.cache
def register() -> None:
    """Tells Inductor of the operators in this process."""
    linear, by_rows = torch.ops.sparsefx_cpp.linear.default, torch.ops.sparsefx_rows.linear.default

    def lower_linear(
        x: Node,
        packed: Sequence[Node],
        bias: Node | None,
        extras: Sequence[Node],
        handle: str,
        features: int,
    ) -> object:
        if not _is_direct(x):
            return fallback_handler(linear)(x, packed, bias, extras, handle, features)
        return _call("linear", x, packed, None, bias, extras, handle, features)

    def lower_by_rows(
        x: Node,
        packed: Sequence[Node],
        weight: Node | None,
        bias: Node | None,
        extras: Sequence[Node],
        routes: str,
        features: int,
    ) -> object:
        if not _is_direct(x):
            return fallback_handler(by_rows)(x, packed, weight, bias, extras, routes, features)
        return _call("by_rows", x, packed, weight, bias, extras, routes, features)

    _register(linear, lower_linear)
    _register(by_rows, lower_by_rows)


def _register(operator: OpOverload, lower: Callable[..., object]) -> None:
    register_lowering(operator, type_promotion_kind=None)(lower)


def _is_direct(x: Node) -> bool:
    """Not where Inductor writes C++ instead of Python: there operators are called as they are."""
    return x.get_device_or_error().type == "cpu" and not V.graph.cpp_wrapper


def _call(
    name: str,
    x: Node,
    packed: Sequence[Node],
    weight: Node | None,
    bias: Node | None,
    extras: Sequence[Node],
    text: str,
    features: int,
) -> Node:
    tensors = [x, *packed, *(each for each in (weight, bias) if each is not None), *extras]
    size = [*x.get_size()[:-1], features]
    return ir.TensorBox.create(
        _Direct(
            layout=ir.FixedLayout(x.get_device_or_error(), x.get_dtype(), size),
            inputs=[ir.ExternKernel.require_contiguous(each) for each in tensors],
            constant_args=[text, len(packed), weight is not None, bias is not None],
            python_kernel_name=f"sparsefx_{name}",  # as _Direct imports it
        )
    )
