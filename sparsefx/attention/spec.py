"""What a recipe may ask of attention: SkipSoftmax and Theta, frozen dataclasses."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeGuard

from torch import nn

from sparsefx.errors import InvalidThreshold

ORDERS = ("sink_diagonal", "ascending")
PER = ("head", "model")
TILES = (16, 32, 64, 128)
PLACEMENTS = ("pre", "post")
DENOMINATORS = ("exact", "exp_threshold", "offline", "none")
_INF = float("inf")
Metric = Callable[[nn.Module], float]


@dataclass(frozen=True)
class SkipSoftmax:
    """Key tiles whose scores lie far below a row's running maximum are skipped (BLASST).

    A tile is skipped if, in all its rows, the largest score is below the running maximum by more
    than -ln(lambda), lambda = scale_factor / keys (arXiv 2512.12087). Exactly one goal is given:

    sparsity: share of visible tiles to skip over the whole model, in (0, 1).
    error: largest relative output error of a layer, |O - O_dense| / |O_dense| in the 2-norm over
    the calibration data, in (0, 1).
    scale_factor: (prefill, decode) factors, or one for both, taken as they are, the same for all
    heads; calibration data, if given, then only measures what they do.

    per: "head" gives every head a factor of its own under one budget; "model" is the paper's single
    factor, fitted by a * exp(b * sparsity). order: in which the tiles of a row are visited,
    "sink_diagonal" (the first tile, then from the diagonal backwards) or "ascending" (the paper).
    tile: (query rows, keys), each 16, 32, 64 or 128; None takes (64, 64) on CPU and (128, 64) on
    CUDA. metric, within: a loss of the model (lower is better) and by how much of its dense value
    it may rise; the budget is cut until that holds.
    """

    sparsity: float | None = None
    error: float | None = None
    scale_factor: float | tuple[float, float] | None = None
    per: str = "head"
    order: str = "sink_diagonal"
    tile: tuple[int, int] | None = None
    metric: Metric | None = None
    within: float = 0.01

    def __post_init__(self) -> None:
        goals = (self.sparsity, self.error, self.scale_factor)
        if sum(goal is not None for goal in goals) != 1:
            raise _misuse(self, "exactly one of sparsity, error and scale_factor is the goal")
        for name in ("sparsity", "error"):
            goal = getattr(self, name)
            if goal is not None and not (_is_number(goal) and 0 < goal < 1):
                raise _misuse(self, f"{name}={goal!r} must lie in (0, 1)")
        if self.factors is not None and not _are_factors(self.factors):
            raise _misuse(self, "a scale factor is a finite number from 0 on, or two of them")
        _one_of(self, "per", PER)
        _one_of(self, "order", ORDERS)
        tile = self.tile
        if tile is not None and not _is_tile(tile):
            raise _misuse(self, f"tile={tile!r} must be two of {TILES}")
        if not _is_number(self.within) or not 0 < self.within < 1:
            raise _misuse(self, f"within={self.within!r} must lie in (0, 1)")

    @property
    def factors(self) -> tuple[float, float] | None:
        """The given scale factors of prefill and decode, or None if they are to be calibrated."""
        given = self.scale_factor
        if given is None:
            return None
        return given if isinstance(given, tuple) else (given, given)


@dataclass(frozen=True)
class Theta:
    """Scores below a threshold of their head and row length are dropped (Top-Theta).

    The threshold of a row with n visible keys lets about k of them pass (arXiv 2502.08363); rows
    with n <= k stay dense.

    k: elements to keep in a row. dense_k, dense_layers: the first `dense_layers` layers keep
    `dense_k`. placement: "pre" drops scores before the softmax, "post" drops probabilities after
    it. denominator: what stands for the dropped part of the softmax's sum, "exact", "exp_threshold"
    (each counts as much as the threshold), "offline" (its calibrated mean) or "none"; read by "pre"
    only. v_mean: give the lost mass to the mean of V. deviations: how many standard deviations over
    the calibration rows are added to the mean threshold.
    """

    k: int
    placement: str = "pre"
    denominator: str = "exact"
    v_mean: bool = True
    dense_k: int = 512
    dense_layers: int = 2
    deviations: float = 0.1

    def __post_init__(self) -> None:
        for name in ("k", "dense_k"):
            value = getattr(self, name)
            if not _is_whole(value) or value < 1:
                raise _misuse(self, f"{name}={value!r} must be a whole number from 1 on")
        if not _is_whole(self.dense_layers) or self.dense_layers < 0:
            rule = f"dense_layers={self.dense_layers!r} must be a whole number from 0 on"
            raise _misuse(self, rule)
        if not _is_number(self.deviations) or not -_INF < self.deviations < _INF:
            raise _misuse(self, f"deviations={self.deviations!r} must be a finite number")
        if not isinstance(self.v_mean, bool):
            raise _misuse(self, f"v_mean={self.v_mean!r} must be True or False")
        _one_of(self, "placement", PLACEMENTS)
        _one_of(self, "denominator", DENOMINATORS)


AttentionPattern = SkipSoftmax | Theta


def default_tile(device: str) -> tuple[int, int]:
    """The tile (query rows, keys) that kernels of a device type are fastest with."""
    return (128, 64) if device == "cuda" else (64, 64)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_factors(given: tuple[object, ...]) -> bool:
    return len(given) == 2 and all(_is_number(f) and 0 <= f < _INF for f in given)


def _is_tile(tile: object) -> bool:
    sizes = tile if isinstance(tile, tuple) else ()
    return len(sizes) == 2 and all(type(size) is int and size in TILES for size in sizes)


def _one_of(spec: object, name: str, known: tuple[str, ...]) -> None:
    if getattr(spec, name) not in known:
        raise _misuse(spec, f"{name}={getattr(spec, name)!r} is not one of {', '.join(known)}")


def _misuse(spec: object, rule: str) -> InvalidThreshold:
    return InvalidThreshold(what=type(spec).__name__, rule=rule)
