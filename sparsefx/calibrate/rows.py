"""The rows of a layer's input: one for each token, or each output pixel of a convolution.

Columns are in the order of those of `PrunableWeight.matrix()`. Each row goes to one part of the
weight: to an expert, or to a group of a convolution.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

_CHUNK = 2**24  # elements of unfolded patches that exist at a time: 64 MiB


@dataclass(frozen=True)
class Tokens:
    """What the inputs of a batch say about its rows.

    samples: how many sequences or images; counted: bool [batch, length], False for padding, None
    where every row counts; decoded: the same of the tokens that a decoder behind an encoder reads.
    """

    samples: int
    counted: Tensor | None = None
    decoded: Tensor | None = None

    def counting(self, in_decoder: bool) -> Tensor | None:
        """Which tokens count, there or elsewhere."""
        return self.decoded if in_decoder else self.counted

    def of(self, x: Tensor, in_decoder: bool = False) -> Tensor:
        """x [..., features] as rows [n, features], without those of padding tokens."""
        rows = x.reshape(-1, x.shape[-1])
        counted = self.counting(in_decoder)
        if counted is None:
            return rows
        if x.shape[:-1] == counted.shape:
            return rows[counted.flatten()]
        # Some models (GPT-2) flatten [batch, length, features] before a linear.
        is_flat = x.dim() == 2 and x.shape[0] == counted.numel()
        return rows[counted.flatten()] if is_flat else rows


Parts = Iterator[tuple[int, Tensor, int]]
"""Number of a part of the weight, rows [n, in] of its input, and of how many samples they are."""


@dataclass(frozen=True)
class LinearRows:
    """The last axis of the input, as it is. in_decoder: whose tokens the rows are."""

    in_decoder: bool = False

    def __call__(self, tokens: Tokens, x: Tensor) -> Parts:
        """All rows at once."""
        yield 0, tokens.of(x, self.in_decoder), tokens.samples


@dataclass(frozen=True)
class ExpertRows:
    """The rows of a product of experts, which are sorted by expert.

    tokens: from how many the rows were gathered, 0 where that is not known and padding counts;
    in_decoder: whose they are.
    """

    tokens: int = 0
    in_decoder: bool = False

    def __call__(
        self, tokens: Tokens, x: Tensor, ends: Tensor, places: Tensor | None = None
    ) -> Parts:
        """The rows of each expert, of some of them none.

        x: [rows, in]; ends: behind the last row of each expert, [experts]; places: [rows], of which
        token each row is.
        """
        counted = tokens.counting(self.in_decoder)
        if counted is not None:
            is_known = places is not None and counted.numel() == self.tokens
            counted = counted.flatten()[places] if is_known else None
        start = 0
        for expert, end in enumerate(ends.tolist()):
            rows = x[start:end]
            own = rows if counted is None else rows[counted[start:end]]
            yield expert, own, tokens.samples
            start = end


@dataclass(frozen=True)
class PatchRows:
    """The patches that a 2-d convolution sees, [n, R * S * C], channels fastest."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]  # left, right, top, bottom, as F.pad takes it
    dilation: tuple[int, int]
    groups: int

    def __call__(self, tokens: Tokens, x: Tensor) -> Parts:
        """The rows of each group, of a few samples at a time."""
        x = F.pad(x if x.dim() == 4 else x[None], self.padding).float()
        taps = self.kernel[0] * self.kernel[1]
        pixels = x[0].numel() // (self.stride[0] * self.stride[1])
        for some in x.split(max(1, _CHUNK // max(1, pixels * taps))):
            patches = F.unfold(some, self.kernel, self.dilation, 0, self.stride)
            grouped = patches.unflatten(1, (self.groups, -1, taps))  # [n, g, C / g, R * S, pixels]
            for group, own in enumerate(grouped.permute(1, 0, 4, 3, 2)):
                yield group, own.flatten(2).flatten(0, 1), some.shape[0]


Rows = LinearRows | PatchRows | ExpertRows
