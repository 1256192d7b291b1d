"""Which attentions of a model are to be sparse, and with what thresholds."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from sparsefx.annotations import attention_thresholds
from sparsefx.attention.spec import SkipSoftmax
from sparsefx.attention.thresholds import AttentionThresholds, SkipThresholds
from sparsefx.errors import HeadsMismatch
from sparsefx.spec import Recipe


@dataclass(frozen=True)
class Wanted:
    """Calibrated thresholds by attention name, and a recipe whose given factors need no data.

    tile: (query rows, keys) where the recipe names none.
    """

    thresholds: Mapping[str, AttentionThresholds] = field(default_factory=dict)
    recipe: Recipe | None = None
    tile: tuple[int, int] = (64, 64)

    def __bool__(self) -> bool:
        return bool(self.thresholds) or self._asks()

    def _asks(self) -> bool:
        return self.recipe is not None and self.recipe.attention is not None

    def beside(self, model: nn.Module) -> "Wanted":
        """The same or, if no recipe asks for attention, what the model is annotated with."""
        if self._asks():
            return self
        return Wanted({**attention_thresholds(model), **self.thresholds}, self.recipe, self.tile)

    def leaves(self, name: str) -> bool:
        """Whether a recipe asks for attention, and not for this one."""
        return self.recipe is not None and self._asks() and not self.recipe.attention_for(name)

    def of(self, name: str, heads: int) -> AttentionThresholds | None:
        """The thresholds of the attention `name`, None if it stays dense. Raises HeadsMismatch."""
        found = self.thresholds.get(name) or self._given(name, heads)
        if found is None:
            return None
        counts = {found.heads, len(found.decode) if isinstance(found, SkipThresholds) else heads}
        if counts != {heads}:
            stored = max(counts - {heads})
            raise HeadsMismatch(name=name, stored=stored, heads=heads)
        return found

    def _given(self, name: str, heads: int) -> SkipThresholds | None:
        pattern = None if self.recipe is None else self.recipe.attention_for(name)
        if not isinstance(pattern, SkipSoftmax) or pattern.factors is None:
            return None
        prefill, decode = pattern.factors
        tile = pattern.tile or self.tile
        return SkipThresholds((prefill,) * heads, (decode,) * heads, tile, pattern.order)
