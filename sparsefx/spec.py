"""What may be said about a model: patterns, criteria and the Recipe, all frozen dataclasses."""

import fnmatch
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import tomli_w
import torch
from torch import Tensor

from sparsefx.attention.spec import AttentionPattern
from sparsefx.errors import InvalidPattern, InvalidRecipe
from sparsefx.files import write_atomically


@dataclass(frozen=True)
class Magnitude:
    """Keep the weights of largest absolute value (Han et al. 2015, arXiv 1506.02626)."""

    def scores(self, weight: Tensor) -> Tensor:
        """Importance of each weight, float32, same shape as `weight`; larger is kept."""
        return weight.detach().abs().float()


Criterion = Magnitude


@dataclass(frozen=True)
class Unstructured:
    """Any position may be zero; `sparsity` is the share of zeros in each weight, in [0, 1)."""

    sparsity: float
    criterion: Criterion = Magnitude()

    def __post_init__(self) -> None:
        _check_sparsity(self, self.sparsity)

    def __str__(self) -> str:
        return f"unstructured {self.sparsity:.0%}"

    def misfit(self, shape: torch.Size) -> str | None:
        """Why the pattern cannot be laid on a [out, in] weight of this shape, or None."""
        return None

    def keep(self, scores: Tensor) -> Tensor:
        """Bool [out, in], True where the weight stays: the highest scores of the whole tensor.

        Ties go to the lower index, so that the count is exact and the mask deterministic.
        """
        drop = int(self.sparsity * scores.numel())
        order = scores.flatten().sort(stable=True, descending=True).indices
        keep = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
        keep[order[scores.numel() - drop :]] = False
        return keep.view(scores.shape)


@dataclass(frozen=True)
class NM:
    """N:M sparsity: N weights **kept** out of each M consecutive ones along the input dimension.

    2:4 is the pattern of sparse tensor cores (Mishra et al. 2021, arXiv 2104.08378).
    """

    n: int
    m: int
    criterion: Criterion = Magnitude()

    def __post_init__(self) -> None:
        if not _whole(self.n, self.m) or not 0 < self.n < self.m:
            raise InvalidPattern(
                pattern=f"NM({self.n}, {self.m})",
                rule="n counts the weights kept of each m and 0 < n < m must hold",
                remedy="2:4 is NM(2, 4)",
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def sparsity(self) -> float:
        """Share of zeros, in (0, 1)."""
        return 1 - self.n / self.m

    def misfit(self, shape: torch.Size) -> str | None:
        """Why the pattern cannot be laid on a [out, in] weight of this shape, or None."""
        if shape[1] % self.m:
            return f"{shape[1]} input features are not a multiple of m={self.m}"
        return None

    def keep(self, scores: Tensor) -> Tensor:
        """Bool [out, in], True where the weight stays: the n highest scores of each group of m.

        Ties go to the lower index.
        """
        groups = scores.reshape(scores.shape[0], -1, self.m)
        order = groups.sort(dim=-1, stable=True, descending=True).indices[..., : self.n]
        keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True)
        return keep.view(scores.shape)


@dataclass(frozen=True)
class Block:
    """Whole `rows` x `cols` tiles of the weight are zero; `sparsity` is the share of zero tiles."""

    rows: int
    cols: int
    sparsity: float
    criterion: Criterion = Magnitude()

    def __post_init__(self) -> None:
        _check_sparsity(self, self.sparsity)
        if not _whole(self.rows, self.cols) or self.rows < 1 or self.cols < 1:
            raise InvalidPattern(
                pattern=f"Block({self.rows}, {self.cols})",
                rule="a block has at least one row and one column",
                remedy="32 x 32 blocks are Block(32, 32, sparsity)",
            )

    def __str__(self) -> str:
        return f"block {self.rows}x{self.cols} {self.sparsity:.0%}"

    def misfit(self, shape: torch.Size) -> str | None:
        """Why the pattern cannot be laid on a [out, in] weight of this shape, or None."""
        if shape[0] % self.rows or shape[1] % self.cols:
            return f"{shape[0]} x {shape[1]} is not a grid of {self.rows} x {self.cols} blocks"
        return None

    def keep(self, scores: Tensor) -> Tensor:
        """Bool [out, in], True where the weight stays: the blocks of highest summed score."""
        out, width = scores.shape
        tiles = scores.reshape(out // self.rows, self.rows, width // self.cols, self.cols)
        kept = Unstructured(self.sparsity).keep(tiles.sum((1, 3)))
        return kept[:, None, :, None].expand(tiles.shape).reshape(scores.shape)


Pattern = Unstructured | NM | Block


@dataclass(frozen=True)
class Recipe:
    """What to make sparse, and how.

    `weights` maps globs on parameter names (`"*.mlp.*"`) to a pattern, or to None for "stay dense";
    the first glob that matches a weight decides. `attention` is a SkipSoftmax or Theta for every
    attention, or maps globs on attention names ("*.layers.1?.self_attn") to one or to None.
    """

    weights: Mapping[str, Pattern | None] = field(default_factory=dict)
    attention: AttentionPattern | Mapping[str, AttentionPattern | None] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.weights, Mapping):
            raise _misuse("weights", f"{self.weights!r} is not a dict of globs and patterns")
        for key, pattern in self.weights.items():
            if not isinstance(key, str):
                raise _misuse("weights", f"the key {key!r} is not a glob on parameter names")
            if not isinstance(pattern, Pattern | None):
                raise _misuse(f"weights[{key!r}]", f"{pattern!r} is not a pattern")
        for glob, wanted in self._attention_globs().items():
            if not isinstance(glob, str):
                raise _misuse("attention", f"the key {glob!r} is not a glob on attention names")
            if not isinstance(wanted, AttentionPattern | None):
                raise _misuse("attention", f"{wanted!r} is not a SkipSoftmax or a Theta")

    def _attention_globs(self) -> Mapping[str, AttentionPattern | None]:
        if self.attention is None:
            return {}
        return self.attention if isinstance(self.attention, Mapping) else {"*": self.attention}

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

    def to_toml(self, path: str | Path) -> None:
        """Writes the recipe as TOML; the file appears whole or not at all."""
        entries = [{"match": glob, **_entry(pattern)} for glob, pattern in self.weights.items()]
        write_atomically(Path(path), tomli_w.dumps({"weights": entries}).encode())

    @classmethod
    def from_toml(cls, path: str | Path) -> "Recipe":
        """Reads a recipe that `to_toml` wrote. Raises InvalidRecipe, InvalidPattern, OSError."""
        try:
            table = tomllib.loads(Path(path).read_text())
        except (ValueError, RecursionError) as error:  # tomllib on bad syntax, UTF-8, digits, depth
            raise _invalid(path, f"not TOML: {error}") from error
        unknown = set(table) - {"weights"}
        if unknown:
            raise _invalid(path, f"unknown section {sorted(unknown)[0]!r}, known: weights")
        entries = table.get("weights", [])
        if not isinstance(entries, list):
            raise _invalid(path, "weights must be an array of tables, [[weights]]")
        weights = dict(_parse_entry(path, entry) for entry in entries)
        if len(weights) < len(entries):
            raise _invalid(path, "two [[weights]] entries have the same match")
        return cls(weights=weights)


_KINDS: dict[str, Callable[..., Pattern] | None] = {
    "unstructured": Unstructured,
    "nm": NM,
    "block": Block,
    "dense": None,
}
_NUMBERS = {"unstructured": ("sparsity",), "nm": ("n", "m"), "block": ("rows", "cols", "sparsity")}


def _entry(pattern: Pattern | None) -> dict[str, object]:
    if pattern is None:
        return {"pattern": "dense"}
    kind = type(pattern).__name__.lower()
    numbers = {name: getattr(pattern, name) for name in _NUMBERS[kind]}
    return {"pattern": kind, **numbers, "criterion": type(pattern.criterion).__name__.lower()}


def _parse_entry(path: str | Path, entry: object) -> tuple[str, Pattern | None]:
    if not isinstance(entry, dict) or not isinstance(entry.get("match"), str):
        raise _invalid(path, "each [[weights]] entry needs match = '<glob>'")
    kind = entry.get("pattern")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise _invalid(path, f"pattern {kind!r} is not one of {', '.join(_KINDS)}")
    make = _KINDS[kind]
    if make is None:
        return entry["match"], None
    if entry.get("criterion", "magnitude") != "magnitude":
        raise _invalid(path, f"criterion {entry['criterion']!r} is not one of magnitude")
    numbers = {name: entry.get(name) for name in _NUMBERS[kind]}
    extra = set(entry) - {"match", "pattern", "criterion", *numbers}
    if extra or not all(_is_number(name, value) for name, value in numbers.items()):
        raise _invalid(path, f"pattern {kind!r} takes the numbers {', '.join(numbers)}")
    return entry["match"], make(**numbers)


def _is_number(name: str, value: object) -> bool:
    legal = int | float if name == "sparsity" else int
    return isinstance(value, legal) and not isinstance(value, bool)


def _misuse(where: str, rule: str) -> InvalidRecipe:
    remedy = 'Write Recipe(weights={"*.mlp.*": NM(2, 4), "lm_head.*": None})'
    return InvalidRecipe(where=where, rule=rule, remedy=remedy)


def _invalid(path: str | Path, rule: str) -> InvalidRecipe:
    return InvalidRecipe(where=path, rule=rule, remedy="Recipe.to_toml shows the form")


def _whole(*numbers: object) -> bool:
    return all(isinstance(number, int) for number in numbers)


def _check_sparsity(pattern: object, sparsity: object) -> None:
    if not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise InvalidPattern(
            pattern=f"{type(pattern).__name__}(sparsity={sparsity})",
            rule="sparsity is the share of zeros and must lie in [0, 1)",
            remedy="Half of the weights is 0.5, not 50",
        )
