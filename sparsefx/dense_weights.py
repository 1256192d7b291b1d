"""The dense weights of packed linears by name, those of several linears at once included."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stack:
    """Weights whose rows lie in one: one below the other, or row by row in turns (`interleaved`).

    parts: the name of each and whether it is stored [in, out]; one weight alone is a stack too.
    """

    parts: tuple[tuple[str, bool], ...]
    interleaved: bool = False

    @property
    def order(self) -> str:
        """How the parts lie, as text: "" for one alone."""
        if len(self.parts) == 1:
            return ""
        return " interleaved" if self.interleaved else " stacked"

    def stored(self, weights: Mapping[str, Tensor]) -> list[tuple[Tensor, bool]]:
        """The parts as their parameters hold them, and whether that is [in, out]."""
        return [(weights[name], transposed) for name, transposed in self.parts]

    def dense(self, weights: Mapping[str, Tensor]) -> Tensor:
        """The stack [sum of out, in]; a copy."""
        stored = ((weight.detach(), turned) for weight, turned in self.stored(weights))
        return self.joined([weight.t() if turned else weight for weight, turned in stored])

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Tensors with a row for each output feature, such as biases, in the order of the rows."""
        rows = list(parts)
        return torch.stack(rows, 1).flatten(0, 1) if self.interleaved else torch.cat(rows)


class DenseWeights(dict[str, Tensor]):
    """Name -> weight as its parameter holds it. A stack is put together whenever it is asked for,
    so that none stays in memory."""

    def __init__(self) -> None:
        super().__init__()
        self._stacks: dict[str, Stack] = {}

    def add(self, stack: Stack) -> str:
        """Makes a stack known; returns its name, under which it is stored [out, in]."""
        name = f"{stack.parts[0][0]}_{'gated' if stack.interleaved else 'merged'}"
        while self._stacks.setdefault(name, stack) != stack:
            name += "_"
        return name

    def stack(self, name: str, transposed: bool) -> Stack:
        """What a weight is made of: of itself alone if it is no stack."""
        return self._stacks.get(name) or Stack(((name, transposed),))

    def __missing__(self, name: str) -> Tensor:
        return self._stacks[name].dense(self)
