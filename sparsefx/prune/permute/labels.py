"""Labels: which channel each place of a tensor belongs to, as small broadcastable int64 tensors.

Labels have the rank of the tensor they describe, and size 1 along every axis on which the channel
does not depend: those of x [batch, tokens, channels] are [1, 1, channels]. -1 is a place that
belongs to none.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

NONE = -1


def compressed(labels: Tensor) -> Tensor:
    """The same labels with every axis along which they are constant brought to size 1."""
    for axis, size in enumerate(labels.shape):
        first = labels.narrow(axis, 0, 1)
        if size > 1 and (labels.stride(axis) == 0 or bool((labels == first).all())):
            labels = first
    return labels


def reshaped(labels: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """Labels of a tensor of shape `before` that is viewed as `after`."""
    # Axes of stride 0 split and merge without a copy, so this is cheap for large activations.
    return compressed(labels.expand(*before).reshape(*after))


def varying(labels: Tensor) -> list[int]:
    """The axes along which the channel changes."""
    return [axis for axis, size in enumerate(labels.shape) if size > 1]


def ranks(labels: Tensor) -> Tensor:
    """How often the label of each place occurred before it, in the order of memory; same shape.

    Several places of one label are its copies; two labels exchange copy for copy.
    """
    flat = labels.flatten()
    ordered, places = flat.sort(stable=True)
    position = torch.arange(len(flat))
    starts = torch.ones(len(flat), dtype=torch.bool)
    starts[1:] = ordered[1:] != ordered[:-1]
    first = torch.where(starts, position, 0).cummax(0).values
    found = torch.empty_like(flat)
    found[places] = position - first
    return found.view(labels.shape)


class Classes:
    """Which labels were found to be one: a union-find over 0..count-1."""

    def __init__(self, count: int) -> None:
        self._parent = list(range(count))

    def join(self, first: Tensor, second: Tensor) -> None:
        """Makes first[i] and second[i] one label; both broadcast, places of NONE do not count."""
        one, other = torch.broadcast_tensors(first, second)
        differ = (one != other) & (one != NONE) & (other != NONE)
        for a, b in zip(one[differ].tolist(), other[differ].tolist(), strict=True):
            low, high = sorted((self._root(a), self._root(b)))
            self._parent[high] = low

    def roots(self) -> Tensor:
        """int64 [count + 1]: the least label of each one's class; NONE, the last, stays."""
        return torch.tensor([*(self._root(label) for label in range(len(self._parent))), NONE])

    def _root(self, label: int) -> int:
        while self._parent[label] != label:
            self._parent[label] = self._parent[self._parent[label]]
            label = self._parent[label]
        return label
