"""How one budget is spread over the layers that a recipe prunes: frozen dataclasses."""

import math
from dataclasses import dataclass

from sparsefx import devices
from sparsefx.attention.spec import Metric
from sparsefx.errors import InvalidAllocation
from sparsefx.patterns import NM, Pattern, Unstructured

SCORES = ("gradient", "magnitude", "square")
BUDGETS = ("parameters", "bytes", "time")
OBJECTIVES = ("loss", "error")
GROUPS = ("weight", "block")


@dataclass(frozen=True)
class Uniform:
    """Every layer gets the sparsity that the recipe asks for."""


@dataclass(frozen=True)
class ER:
    """Densities in proportion to (in + out) / (in * out), at most 1 (Erdos-Renyi).

    Mocanu et al. 2018, arXiv 1707.04780. Large layers become sparser than small ones. A
    convolution counts as its channels.
    """


@dataclass(frozen=True)
class ERK:
    """ER with the kernel's sizes among the sums and products (Evci et al. 2020, arXiv 1911.11134).

    The same as ER for linear layers.
    """


@dataclass(frozen=True)
class OWL:
    """Blocks with more outliers stay denser (outlier-weighed layers, Yin et al., arXiv 2310.05175).

    A block's outliers are its Wanda scores |W| * ||X|| above `outlier` times their mean over the
    block. All layers of a block share one sparsity; blocks differ by at most 2 * `spread`, their
    mean is the sparsity asked for. For N:M patterns n differs by at most `nm_spread`.
    """

    spread: float = 0.08
    outlier: float = 5.0
    nm_spread: float = 2.0

    def __post_init__(self) -> None:
        if not _is_number(self.spread) or not 0 <= self.spread <= 0.5:
            raise _misuse(self, f"spread={self.spread!r} must lie in [0, 0.5]")
        for name in ("outlier", "nm_spread"):
            value = getattr(self, name)
            if not _is_number(value) or value < 0:
                raise _misuse(self, f"{name}={value!r} must be a number from 0 on")


@dataclass(frozen=True)
class GlobalMagnitude:
    """One threshold on |w| for all layers, with a minimum kept in each (arXiv 2209.14624).

    min_keep: the share of **all** weights, in [0, 1), that every layer keeps at least; a layer that
    is smaller stays dense. Each keeps one weight in any case.
    """

    min_keep: float = 1e-4

    def __post_init__(self) -> None:
        if not _is_number(self.min_keep) or not 0 <= self.min_keep < 1:
            raise _misuse(self, f"min_keep={self.min_keep!r} must lie in [0, 1)")


@dataclass(frozen=True)
class ZerothOrder:
    """Layers stay dense in proportion to how much the loss moves with them (ECoFLaP).

    Sung et al. 2023, arXiv 2310.02998. Each weight tensor alone is moved by +-epsilon z, z standard
    normal, and G = mean |L(+) - L(-)| / (2 epsilon) over `samples` draws, each with its noise and
    its batch: two runs of the model a draw and tensor, and no gradients.

    score: "gradient" is G, "magnitude" mean |W| * G, "square" mean W^2 * G^2. per: "weight", or
    "block" for one ratio in all layers of a block. max_sparsity: no layer becomes sparser; what is
    left of the budget beyond that is handed out in proportion to the scores. seed: of the noise.
    """

    samples: int = 4
    epsilon: float = 1e-3
    max_sparsity: float = 0.8
    score: str = "gradient"
    per: str = "weight"
    seed: int = 0

    def __post_init__(self) -> None:
        if not _is_whole(self.samples) or self.samples < 1:
            raise _misuse(self, f"samples={self.samples!r} must be a whole number from 1 on")
        if not _is_number(self.epsilon) or self.epsilon <= 0:
            raise _misuse(self, f"epsilon={self.epsilon!r} must be above 0")
        if not _is_number(self.max_sparsity) or not 0 < self.max_sparsity < 1:
            raise _misuse(self, f"max_sparsity={self.max_sparsity!r} must lie in (0, 1)")
        if not _is_whole(self.seed) or not 0 <= self.seed < 2**63:
            raise _misuse(self, f"seed={self.seed!r} must be a whole number in [0, 2**63)")
        _one_of(self, "score", SCORES)
        _one_of(self, "per", GROUPS)


_HALF = Unstructured(0.5)
_CHOICES = (None, NM(4, 8), NM(2, 4), Unstructured(0.3), _HALF, Unstructured(0.7))


@dataclass(frozen=True)
class Knapsack:
    """The choice of one pattern a layer of least summed error within a budget, solved exactly.

    The table of errors is measured layer by layer; a multi-choice knapsack as in ROCKET
    (mts-ai/ROCKET), with patterns as choices and an exact solver.

    objective: what is summed. "loss" is the rise of the model's loss to be expected, to second
    order: half of each output's squared change times the mean squared gradient of the loss at it
    (as GuidedQuant weighs layers, Kim et al. 2025, arXiv 2505.07004). The loss is the output's own
    `loss`, or that of the next token; of a model without either, the squared change of its outputs.
    "error" is ||(W - W')X||^2 / ||W X||^2 of each layer. choices: patterns, None for dense, under
    the criterion of the recipe and not their own; one that does not fit a layer is left out there.
    budget: what is spent, "parameters" kept, "bytes" stored or "time" predicted on `target`
    ("A100", "H100", "H200", "L4" or "cpu") for `rows` rows of input. share: of what all layers cost
    dense, in (0, 1], that may be spent; None for what the recipe's own patterns would cost.
    """

    choices: tuple[Pattern | None, ...] = _CHOICES
    budget: str = "bytes"
    target: str | None = None
    rows: int = 1
    share: float | None = None
    objective: str = "loss"

    def __post_init__(self) -> None:
        self._check_choices()
        _one_of(self, "objective", OBJECTIVES)
        _one_of(self, "budget", BUDGETS)
        if (self.target is not None) != (self.budget == "time"):
            raise _misuse(self, 'target is given for budget="time", and for no other')
        if self.target is not None:
            if not isinstance(self.target, str):
                raise _misuse(self, f"target={self.target!r} must be a name such as A100 or cpu")
            devices.named(self.target)
        if not _is_whole(self.rows) or self.rows < 1:
            raise _misuse(self, f"rows={self.rows!r} must be a whole number from 1 on")
        if self.share is not None and not (_is_number(self.share) and 0 < self.share <= 1):
            raise _misuse(self, f"share={self.share!r} must lie in (0, 1]")

    def _check_choices(self) -> None:
        choices: object = self.choices
        if not isinstance(choices, tuple) or not choices:
            raise _misuse(self, "choices is a tuple of at least one pattern")
        for choice in choices:
            if not isinstance(choice, Pattern | None):
                raise _misuse(self, f"the choice {choice!r} is not a pattern, nor None for dense")


@dataclass(frozen=True)
class Within:
    """What a layer or the model may lose is the budget; the recipe's patterns are the most asked.

    Layers back off along a ladder: sparsities in steps of 5 points, N:M patterns from n:m to
    (m-1):m, then dense. Exactly one of error and metric is given:

    error: largest relative output error of a layer, ||(W - W')X|| / ||W X||, in (0, 1). X is what
    the layer reads behind the pruned blocks before its own, as in the report of the pruning, which
    keeps within.
    metric, drop: a loss of the model (lower is better), and by which share of its dense value it
    may get worse, in (0, 1). All layers back off together, rung by rung; of those on one rung the
    layer that errs most on dense inputs gives way first. How far is found by bisection, with at
    most 8 evaluations of the metric, each but the first after a pruning of its own; one pass before
    them tries the whole ladder of every layer.
    """

    error: float | None = None
    metric: Metric | None = None
    drop: float | None = None

    def __post_init__(self) -> None:
        if (self.error is None) == (self.metric is None):
            raise _misuse(self, "exactly one of error and metric is given", _WITHIN)
        if (self.metric is None) != (self.drop is None):
            raise _misuse(self, "drop is given with a metric, and only with one", _WITHIN)
        if self.metric is not None and not callable(self.metric):
            raise _misuse(self, f"metric={self.metric!r} is no function of a model", _WITHIN)
        for name in ("error", "drop"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value < 1):
                raise _misuse(self, f"{name}={value!r} must lie in (0, 1)", _WITHIN)


_WITHIN = "Write Within(error=0.1), or Within(metric=loss, drop=0.02)"
ByData = OWL | ZerothOrder | Knapsack | Within
Allocation = Uniform | ER | ERK | GlobalMagnitude | ByData


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _one_of(allocation: Allocation, name: str, known: tuple[str, ...]) -> None:
    value = getattr(allocation, name)
    if value not in known:
        raise _misuse(allocation, f"{name}={value!r} must be one of {', '.join(known)}")


def _misuse(allocation: Allocation, rule: str, remedy: str | None = None) -> InvalidAllocation:
    name = type(allocation).__name__
    return InvalidAllocation(what=name, rule=rule, remedy=remedy or f"{name}() has working values")
