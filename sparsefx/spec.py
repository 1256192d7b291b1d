"""What may be said about a model: patterns, criteria and the Recipe, all frozen dataclasses."""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sparsefx.allocations import Allocation, ByData
from sparsefx.attention.spec import AttentionPattern, SkipSoftmax
from sparsefx.errors import InvalidRecipe
from sparsefx.files import write_atomically
from sparsefx.patterns import NM as NM
from sparsefx.patterns import Block as Block
from sparsefx.patterns import Criterion as Criterion
from sparsefx.patterns import Magnitude as Magnitude
from sparsefx.patterns import Pattern as Pattern
from sparsefx.patterns import Unstructured as Unstructured
from sparsefx.toml import recipe as recipe_file


@dataclass(frozen=True)
class Recipe:
    """What to make sparse, and how.

    `weights` maps globs on parameter names (`"*.mlp.*"`) to a pattern, or to None for "stay dense";
    the first glob that matches a weight decides. `attention` is a SkipSoftmax or Theta for every
    attention, or maps globs on attention names ("*.layers.1?.self_attn") to one or to None.
    `allocation` spreads the budget that the patterns set over the weights that they match; without
    one every weight gets its pattern as it is. `permute`: whether input channels of N:M weights may
    change places first, where that leaves the model's function as it is and N:M keeps more; its
    function on calls of the kinds that the calibration batches show: let them show all (each task,
    each optional input), since another branch may read the same weights otherwise.
    """

    weights: Mapping[str, Pattern | None] = field(default_factory=dict)
    attention: AttentionPattern | Mapping[str, AttentionPattern | None] | None = None
    allocation: Allocation | None = None
    permute: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.weights, Mapping):
            raise _misuse("weights", f"{self.weights!r} is not a dict of globs and patterns")
        for key, pattern in self.weights.items():
            if not isinstance(key, str):
                raise _misuse("weights", f"the key {key!r} is not a glob on parameter names")
            if not isinstance(pattern, Pattern | None):
                raise _misuse(f"weights[{key!r}]", f"{pattern!r} is not a pattern")
        if not isinstance(self.allocation, Allocation | None):
            raise _misuse("allocation", f"{self.allocation!r} is no way to spread a budget")
        if not isinstance(self.permute, bool):
            raise _misuse("permute", f"{self.permute!r} is neither True nor False")
        for glob, wanted in self._attention_globs().items():
            if not isinstance(glob, str):
                raise _misuse("attention", f"the key {glob!r} is not a glob on attention names")
            if not isinstance(wanted, AttentionPattern | None):
                raise _misuse("attention", f"{wanted!r} is not a SkipSoftmax or a Theta")

    def _attention_globs(self) -> Mapping[str, AttentionPattern | None]:
        if self.attention is None:
            return {}
        return self.attention if isinstance(self.attention, Mapping) else {"*": self.attention}

    def attention_patterns(self) -> tuple[AttentionPattern, ...]:
        """Everything that is asked of attentions."""
        wanted = self._attention_globs().values()
        return tuple(pattern for pattern in wanted if pattern is not None)

    def attention_for(self, name: str) -> AttentionPattern | None:
        """What the attention called `name` is to be, or None where it stays dense."""
        for glob, wanted in self._attention_globs().items():
            if fnmatch.fnmatchcase(name, glob):
                return wanted
        return None

    def pattern_for(self, name: str) -> Pattern | None:
        """The pattern of the parameter called `name`, or None where it stays dense."""
        for glob, pattern in self.weights.items():
            if fnmatch.fnmatchcase(name, glob):
                return pattern
        return None

    def found_by_running(self) -> tuple[object, ...]:
        """What in the recipe is found by running the model on data, as errors name it."""
        patterns = [pattern for pattern in self.weights.values() if pattern is not None]
        found: list[object] = [
            f"{type(pattern.criterion).__name__} for {pattern}"
            for pattern in patterns
            if pattern.criterion.needs
        ]
        if isinstance(self.allocation, ByData):
            found.append(self.allocation)
        if self.permute:
            found.append("permute=True, which captures the model's graph,")
        for wanted in self.attention_patterns():
            if not (isinstance(wanted, SkipSoftmax) and wanted.factors is not None):
                found.append(wanted)
        return tuple(found)

    @property
    def reads_data_once(self) -> bool:
        """Whether one pass over the data decides everything, so that they may be streamed."""
        if self.permute or isinstance(self.allocation, ByData):
            return False
        by_data = any(each is not None and each.criterion.needs for each in self.weights.values())
        return not (by_data and self.attention is not None)

    def to_toml(self, path: str | Path) -> None:
        """Writes the recipe as TOML; the file appears whole or not at all.

        Raises InvalidRecipe for a metric, which is a function and no data, and OSError.
        """
        text = recipe_file.dumps(self.weights, self.attention, self.allocation, self.permute)
        write_atomically(Path(path), text.encode())

    @classmethod
    def from_toml(cls, path: str | Path) -> "Recipe":
        """Reads a recipe that `to_toml` wrote. Raises InvalidRecipe, InvalidPattern, OSError."""
        return cls(*recipe_file.loads(Path(path).read_bytes(), path))


def _misuse(where: str, rule: str) -> InvalidRecipe:
    remedy = 'Write Recipe(weights={"*.mlp.*": NM(2, 4), "lm_head.*": None})'
    return InvalidRecipe(where=where, rule=rule, remedy=remedy)
