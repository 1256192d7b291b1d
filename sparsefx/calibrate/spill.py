"""Activations between blocks: in memory up to a limit, the others on disk.

    ticket = shelf.put(values);  shelf.get(ticket);  shelf.drop(ticket)

A tensor is kept without the repeats of an expanded axis, and without the rest of a larger storage
that it is a view of. In memory or on disk, it comes back with the same values and the same order of
axes in memory, so that what is computed from it is the same to the last bit.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor
from torch.utils import _pytree as pytree

from sparsefx.files import write_atomically


@dataclass(frozen=True)
class _Packed:
    """A tensor in the order of its memory: `order` permutes its axes, `shape` is its own."""

    base: Tensor
    order: tuple[int, ...]
    shape: torch.Size

    def restored(self) -> Tensor:
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return self.base.permute(inverse).expand(self.shape)


@dataclass(frozen=True)
class _Entry:
    """leaves: of the values, tensors packed; where `path` is given their bases lie in that file."""

    leaves: list[object]
    spec: pytree.TreeSpec
    size: int
    path: Path | None = None


class Shelf:
    """Keeps lists of values (tensors, numbers, nests of them) by ticket.

    limit: bytes of tensors that stay in memory, None for no limit; what does not fit goes to files
    in `folder`, which is made when the first one does. `used` and `peak` are bytes in memory now
    and at most.
    """

    def __init__(self, limit: int | None, folder: Path) -> None:
        self.used = self.peak = 0
        self._limit = limit
        self._folder = folder
        self._entries: dict[int, _Entry] = {}
        self._next = 0

    def put(self, values: list[object]) -> int:
        """Keeps `values`; returns the ticket to get them by. Raises OSError if the disk is full."""
        leaves, spec = pytree.tree_flatten(values)
        packed = [_pack(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        size = sum(each.base.nbytes for each in packed if isinstance(each, _Packed))
        ticket, self._next = self._next, self._next + 1
        if self._limit is not None and self.used + size > self._limit:
            path = self._folder / f"{ticket}.safetensors"
            self._entries[ticket] = _Entry(_spill(packed, path), spec, 0, path)
        else:
            self._entries[ticket] = _Entry(packed, spec, size)
            self.used += size
            self.peak = max(self.peak, self.used)
        return ticket

    def get(self, ticket: int) -> list[object]:
        """The values; those on disk are read anew at each call."""
        entry = self._entries[ticket]
        leaves = entry.leaves if entry.path is None else _read(entry.leaves, entry.path)
        restored = [leaf.restored() if isinstance(leaf, _Packed) else leaf for leaf in leaves]
        values: list[object] = pytree.tree_unflatten(restored, entry.spec)
        return values

    def drop(self, ticket: int) -> None:
        """Frees the values of a ticket."""
        entry = self._entries.pop(ticket)
        self.used -= entry.size
        if entry.path is not None:
            entry.path.unlink(missing_ok=True)


def _pack(x: Tensor) -> _Packed:
    x, shape = x.detach(), x.shape
    for axis, stride in enumerate(x.stride()):
        if stride == 0 and x.shape[axis] > 1:
            x = x.narrow(axis, 0, 1)
    strides = x.stride()
    order = tuple(sorted(range(x.dim()), key=lambda axis: -strides[axis]))
    base = x.permute(order).contiguous()
    if base.untyped_storage().nbytes() > base.nbytes:
        base = base.clone()
    return _Packed(base, order, shape)


def _spill(leaves: list[object], path: Path) -> list[object]:
    """Writes the bases of packed leaves; what is left of each is where it goes when it is read."""
    bases: dict[str, Tensor] = {}
    addresses: set[int] = set()
    rest: list[object] = []
    for number, leaf in enumerate(leaves):
        if not isinstance(leaf, _Packed):
            rest.append(leaf)
            continue
        base = leaf.base.cpu()
        if base.data_ptr() in addresses:  # safetensors takes no two tensors over one memory
            base = base.clone()
        addresses.add(base.data_ptr())
        bases[str(number)] = base
        rest.append(replace(leaf, base=leaf.base.new_empty(0)))
    write_atomically(path, save(bases))
    return rest


def _read(leaves: list[object], path: Path) -> list[object]:
    bases = load(path.read_bytes())
    return [
        # A copy: what lies in the bytes of a file is not aligned as tensors in memory are, and
        # kernels may then add in another order.
        replace(
            leaf,
            base=torch.empty_like(bases[str(number)], device=leaf.base.device).copy_(
                bases[str(number)]
            ),
        )
        if isinstance(leaf, _Packed)
        else leaf
        for number, leaf in enumerate(leaves)
    ]
