"""What is known of a model's weights, found once and shared by all its graphs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from sparsefx.detect import Found, tightest
from sparsefx.patterns import Pattern
from sparsefx.values import with_values

Version = tuple[int, int]
"""In-place changes counted by torch, and address."""

Stored = tuple[Tensor, bool]
"""A weight, and whether it is stored [in, out]."""
_Key = tuple[tuple[tuple[int, Version, bool], ...], str]


@dataclass
class WeightMemo:
    """Patterns found in weights and their packed forms, by weight object and version.

    A prefill and a decode graph read the same weights: each is searched and packed once, and both
    graphs hold the same packed tensors.
    """

    _found: "dict[tuple[int, Version, bool], tuple[Tensor, Found]]" = field(default_factory=dict)
    _packed: "dict[_Key, tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]" = field(
        default_factory=dict
    )

    def found(
        self, weight: Tensor, transposed: bool, hint: Pattern | None = None, *, codes: bool = True
    ) -> Found:
        """The tightest pattern in `weight`, seen as [out, in]; `transposed` if stored [in, out].

        hint: what it is said to be; codes: whether its values are looked at too (`with_values`).
        The first answer holds.
        """
        key = (id(weight), version(weight), transposed)
        known = self._found.get(key)
        if known is None:
            stored = weight.detach().t() if transposed else weight.detach()
            found = tightest(stored)
            found = with_values(found, stored, hint) if codes else found
            known = self._found[key] = (weight, found)  # holding it keeps the id valid
        return known[1]  # not self._found[key]: another thread may have called forget()

    def packed(
        self,
        weight: Tensor,
        transposed: bool,
        layout: str,
        pack: Callable[[Tensor], tuple[Tensor, ...]],
    ) -> tuple[Tensor, ...]:
        """`pack(weight as [out, in])`, made once per weight and layout."""
        stored = weight.detach().t() if transposed else weight.detach()
        return self.together(((weight, transposed),), layout, lambda: pack(stored.contiguous()))

    def together(
        self, weights: Sequence[Stored], layout: str, pack: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """`pack()`, made once per sequence of weights that go into it, and layout."""
        key = _key(weights, layout)
        known = self._packed.get(key)
        if known is None:
            held = tuple(weight for weight, _ in weights)  # which keeps their ids valid
            known = self._packed[key] = (held, pack())
        return known[1]

    def release(self, weights: Sequence[Stored], ending: str) -> None:
        """Lets go of what was packed of these weights, in layouts whose names end so."""
        sources, _ = _key(weights, "")
        for key in list(self._packed):
            if key[0] == sources and key[1].endswith(ending):
                self._packed.pop(key, None)

    def pruned(
        self, weight: Tensor, transposed: bool, how: str, prune: Callable[[], Tensor]
    ) -> Tensor:
        """`prune()`, made once per weight and `how`."""
        return self.packed(weight, transposed, f"pruned {how}", lambda _: (prune(),))[0]

    def forget(self) -> None:
        """Lets go of all tensors: those of changed weights would never be asked for again."""
        self._found.clear()
        self._packed.clear()


def _key(weights: Sequence[Stored], layout: str) -> _Key:
    return tuple((id(weight), version(weight), turned) for weight, turned in weights), layout


def version(tensor: Tensor) -> Version:
    """What differs once a tensor was changed in place, or given other memory (`w.data = ...`).

    Two changes cannot be told: those in place through `w.data` and those of inference tensors,
    for which torch keeps no count.
    """
    return -1 if tensor.is_inference() else tensor._version, tensor.data_ptr()
