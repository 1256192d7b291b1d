"""Blocks of labels that may change places among themselves, refined by what tells them apart."""

from collections import defaultdict

import torch
from torch import Tensor

from sparsefx.prune.permute.labels import NONE


class Blocks:
    """A partition of the labels 0..count-1, at first one block."""

    def __init__(self, count: int) -> None:
        self._block = torch.zeros(count, dtype=torch.int64)
        self._met = torch.zeros(count, dtype=torch.bool)

    def tell_apart(self, labels: Tensor, first: Tensor, second: Tensor) -> None:
        """Labels stay in one block only if they occur with the same set of (first, second) pairs.

        labels, first, second: of one shape, integers of at least 0; places of NONE do not count.
        """
        counts = labels != NONE
        if not bool(counts.any()):
            return
        labels, first, second = (each[counts] for each in (labels, first, second))
        self._met[labels] = True
        alike = not bool(first.any()) and not bool(second.any())
        if alike and len(labels) == len(self._block):
            return  # each label once: told apart from none
        pairs = first * (int(second.max()) + 1) + second
        span = int(pairs.max()) + 1
        found = (labels * span + pairs).unique()
        labels, pairs = found // span, found % span
        if len(labels) == len(labels.unique()):
            key = torch.zeros_like(self._block)
            key[labels] = pairs + 1
        else:
            key = _numbered(labels, pairs, len(self._block))
        self._refine(key)

    def pin(self, labels: Tensor) -> None:
        """These labels stay where they are."""
        if len(labels):
            key = torch.zeros_like(self._block)
            key[labels] = labels + 1
            self._refine(key)

    def numbered(self) -> Tensor:
        """int64 [count]: the block of each label, from 0; -1 for those alone in theirs, or never
        met."""
        block = torch.where(self._met, self._block, -1 - torch.arange(len(self._block)))
        _, inverse, sizes = block.unique(return_inverse=True, return_counts=True)
        free = sizes[inverse] > 1
        found = torch.full_like(block, NONE)
        found[free] = inverse[free].unique(return_inverse=True)[1]
        return found

    def _refine(self, key: Tensor) -> None:
        joint = self._block * (int(key.max()) + 1) + key
        self._block = joint.unique(return_inverse=True)[1]


def _numbered(labels: Tensor, pairs: Tensor, count: int) -> Tensor:
    """A number for each label's set of pairs, which come sorted; 0 for labels that have none."""
    sets: dict[int, list[int]] = defaultdict(list)
    for label, pair in zip(labels.tolist(), pairs.tolist(), strict=True):
        sets[label].append(pair)
    numbers: dict[tuple[int, ...], int] = {}
    key = torch.zeros(count, dtype=torch.int64)
    for label, own in sets.items():
        key[label] = numbers.setdefault(tuple(own), len(numbers) + 1)
    return key
