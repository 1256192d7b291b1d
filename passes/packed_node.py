"""A packed linear of a graph, read: what it computes and what kernels may know of it."""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sparsefx.attributes import get_tensor
from sparsefx.candidates import rows_of
from sparsefx.pipeline import PassContext
from sparsefx.target import LinearSpec

_nm_linear = torch.ops.sparsefx.nm_linear.default


@dataclass(frozen=True)
class PackedNode:
    """A packed linear of a graph, read."""

    gm: fx.GraphModule
    node: fx.Node
    ctx: PassContext

    @property
    def x(self) -> fx.Node:
        """The node of its input."""
        x = self.node.args[0]
        assert isinstance(x, fx.Node)
        return x

    @property
    def stored(self) -> list[fx.Node]:
        """The nodes of its packed tensors."""
        count = 2 if self.node.target is _nm_linear else 3
        return list(self.node.args[1 : 1 + count])  # type: ignore[arg-type]

    @property
    def packed(self) -> tuple[Tensor, ...]:
        """Its packed tensors."""
        return tuple(get_tensor(self.gm, str(node.target)) for node in self.stored)

    @property
    def bias(self) -> fx.Node | None:
        """The node of its bias."""
        return self.node.args[1 + len(self.stored)]  # type: ignore[return-value]

    @property
    def bias_value(self) -> Tensor | None:
        """Its bias; zeros of the same size where the graph computes it."""
        if self.bias is None:
            return None
        value: Tensor = self.bias.meta["val"]
        is_constant = self.bias.op == "get_attr"
        return value if is_constant else torch.zeros(value.shape[-1], dtype=value.dtype)

    @property
    def epilogue(self) -> str:
        """Its epilogue, as text."""
        return str(self.node.args[-2])

    @property
    def extras(self) -> list[fx.Node]:
        """The nodes of its epilogue's operands."""
        return list(self.node.args[-1])  # type: ignore[arg-type]

    @property
    def weight(self) -> tuple[str, bool]:
        """The name of its dense weight, and whether that is stored [in, out]."""
        name, transposed = self.node.meta["sparsefx_weight"]
        return str(name), bool(transposed)

    def dense(self) -> Tensor:
        """The dense weight [out, in]: a view of the parameter."""
        name, transposed = self.weight
        weight = self.ctx.dense[name].detach()
        return weight.t() if transposed else weight

    def spec(self) -> LinearSpec:
        """What kernels may know of it."""
        rows, vary = rows_of(self.x)
        dense, values = self.dense(), self.packed[0]
        is_nm = self.node.target is _nm_linear
        return LinearSpec(
            layout="nm" if is_nm else "bitmap",
            out_features=dense.shape[0],
            in_features=dense.shape[1],
            n=int(self.node.args[4]) if is_nm else 0,  # type: ignore[arg-type]
            m=int(self.node.args[5]) if is_nm else 0,  # type: ignore[arg-type]
            density=values.numel() / max(1, dense.numel()),
            dtype=dense.dtype,
            has_bias=self.bias is not None,
            epilogue=self.epilogue,
            rows=rows,
            rows_vary=vary,
        )

    def refusal(self, spec: LinearSpec) -> str | None:
        """Why no kernel may have this node."""
        dtype = self.x.meta["val"].dtype
        if dtype != spec.dtype:
            return f"input is {dtype} and the weight {spec.dtype}"
        if self.dense().is_inference():
            return (
                "torch counts no changes of a weight made in inference mode; load it outside of "
                "that"
            )
        return None
