"""A packed linear of a graph, read: what it computes and what kernels may know of it."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sparsefx.attributes import get_tensor
from sparsefx.candidates import rows_of
from sparsefx.dense_weights import Stack
from sparsefx.packing import PARTS, Packing
from sparsefx.pipeline import PassContext
from sparsefx.target import LinearSpec


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
    def packing(self) -> Packing:
        """How its weight is stored."""
        packing = self.node.meta["sparsefx_packing"]
        assert isinstance(packing, Packing)
        return packing

    @property
    def stored(self) -> list[fx.Node]:
        """The nodes of its packed tensors."""
        scales = [self.node.kwargs["scales"]] if self.packing.values else []
        return [*self.node.args[1 : self._bias_at], *scales]  # type: ignore[list-item]

    @property
    def _bias_at(self) -> int:
        return 1 + len(PARTS[self.packing.layout])

    @property
    def packed(self) -> tuple[Tensor, ...]:
        """Its packed tensors."""
        return tuple(get_tensor(self.gm, str(node.target)) for node in self.stored)

    @property
    def bias(self) -> fx.Node | None:
        """The node of its bias."""
        return self.node.args[self._bias_at]  # type: ignore[return-value]

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
    def is_packed_only(self) -> bool:
        """Whether the model itself brings it packed, and there is no dense weight."""
        return "sparsefx_weight" not in self.node.meta

    @property
    def weight(self) -> tuple[str, bool]:
        """The name of its dense weight, and whether that is stored [in, out]."""
        name, transposed = self.node.meta["sparsefx_weight"]
        return str(name), bool(transposed)

    @property
    def prefix(self) -> str:
        """What names of further tensors for it begin with."""
        return str(self.stored[0].target) if self.is_packed_only else self.weight[0]

    @property
    def sources(self) -> set[str]:
        """Names of the model's tensors that its packed ones were made of, or are."""
        is_own = self.is_packed_only
        return {str(node.target) for node in self.stored} if is_own else {self.weight[0]}

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of its weight: [out, in]."""
        last = self.packed[len(PARTS[self.packing.layout]) - 1]
        match self.packing.layout:
            case "block":
                out = (last.shape[0] - 1) * self.packing.block[0]
            case "bitmap":
                out = last.shape[0] - 1
            case _:
                out = last.shape[0]
        return out, int(self.x.meta["val"].shape[-1])

    @property
    def dtype(self) -> torch.dtype:
        """That of its weight."""
        if not self.is_packed_only:
            return self.dense().dtype
        return self.packed[-1 if self.packing.values else 0].dtype

    def unpacked(self) -> Tensor:
        """The dense weight [out, in], made anew of the packed tensors."""
        return self.packing.unpack(self.packed, self.shape[1])

    def dense(self) -> Tensor:
        """The dense weight [out, in]: a view of the parameter, or unpacked once."""
        if self.is_packed_only:
            return self._unpacked_once
        name, transposed = self.weight
        weight = self.ctx.dense[name].detach()
        return weight.t() if transposed else weight

    @functools.cached_property
    def _unpacked_once(self) -> Tensor:
        return self.unpacked()

    def packed_as(self, packing: Packing) -> tuple[Tensor, ...]:
        """Its weight stored as `packing` says, made once a model."""
        if packing == self.packing:
            return self.packed
        return packed_stack(self.ctx, self.ctx.dense.stack(*self.weight), packing)

    def spec(self, packing: Packing) -> LinearSpec:
        """What kernels may know of it, stored as `packing` says."""
        rows, vary = rows_of(self.x)
        out, in_ = self.shape
        return LinearSpec(
            layout=packing.layout,
            out_features=out,
            in_features=in_,
            n=packing.n,
            m=packing.m,
            density=packing.density(self.packed_as(packing), out * in_),
            dtype=self.dtype,
            has_bias=self.bias is not None,
            epilogue=self.epilogue,
            rows=rows,
            rows_vary=vary,
            block=packing.block,
            values=packing.values,
            group=packing.group,
        )

    def refusal(self, spec: LinearSpec) -> str | None:
        """Why no kernel may have this node."""
        dtype = self.x.meta["val"].dtype
        if dtype != spec.dtype:
            return f"input is {dtype} and the weight {spec.dtype}"
        source = self.packed[0] if self.is_packed_only else self.dense()
        if source.is_inference():
            return (
                "torch counts no changes of a weight made in inference mode; load it outside of "
                "that"
            )
        return None


def packed_stack(ctx: PassContext, stack: Stack, packing: Packing) -> tuple[Tensor, ...]:
    """A stack of weights stored as `packing` says, made once a model."""
    return ctx.weights.together(
        stack.stored(ctx.dense),
        f"{packing!r}{stack.order}",
        lambda: packing.pack(stack.dense(ctx.dense).contiguous()),
    )
