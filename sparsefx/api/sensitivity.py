"""sensitivity(): what each layer, and the model, can bear, before anything is pruned."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import nn

from sparsefx import debug
from sparsefx.allocations import GROUPS
from sparsefx.attention.spec import Metric
from sparsefx.calibrate.batches import check_calibration, check_max_memory
from sparsefx.errors import MissingCalibration, UnknownOption
from sparsefx.patterns import NM, Pattern, Unstructured
from sparsefx.prune.layer_of import blocks_of
from sparsefx.prune.measure import Data
from sparsefx.prune.selection import check_pattern, choose_patterns
from sparsefx.prune.sensitivity.records import SensitivityReport
from sparsefx.prune.sensitivity.scan import Asked, scan
from sparsefx.prune.sparsify import prune_to
from sparsefx.prune.weights import PrunableWeight, prunable_weights
from sparsefx.spec import Recipe

CHOICES: tuple[Pattern, ...] = (
    *(Unstructured(share) for share in (0.3, 0.5, 0.6, 0.7, 0.8)),
    NM(4, 8),
    NM(2, 4),
)
"""What is tried unless something else is asked for."""


def sensitivity(
    model: nn.Module,
    recipe: Recipe,
    calibration: Iterable[object],
    metric: Metric | None = None,
    *,
    choices: Sequence[Pattern] = CHOICES,
    by: str = "weight",
    progress: bool = True,
    max_memory: int | None = None,
) -> SensitivityReport:
    """Tries each choice of pattern on each weight that `recipe` prunes, one at a time.

    recipe: which weights, and by the criterion of its pattern for each; what else it says is not
    looked at. calibration: batches as for `sparsify`; one dense pass over them finds the relative
    output error ||(W - W')X|| / ||W X|| of every choice. choices: patterns, whose own criteria are
    not looked at; one that does not fit a weight is left out there, with the reason.

    metric: a loss of the model, lower is better (perplexity, 1 - accuracy). It is asked with each
    weight (by="weight") or each repeated block (by="block") pruned alone, the rest dense: once for
    each of them and each choice. Of 210 weights in 30 blocks and 7 choices these are 1470
    evaluations by weight and 210 by block. Then once more for each choice with all weights pruned,
    on a copy, as `sparsify` would, which is a pruning each. Meanwhile new weights stand in `model`
    and the metric must not change it; in the end, after an exception too, the model is as it was,
    bit for bit. progress, max_memory: as for `sparsify`.

    Returns a SensitivityReport with the knee of each layer and of the model ("essential sparsity").
    Raises NothingMatches, PatternDoesNotFit (of the recipe's own), NonFiniteWeight,
    EmptyCalibration, MissingCalibration, NonFiniteMetric, UnknownOption, and what `run_blocks` and
    the metric raise.
    """
    _check(recipe, choices, by)
    check_max_memory(max_memory)
    batches = check_calibration(calibration)
    if batches is None:
        raise MissingCalibration(what="sensitivity")
    batches = list(batches) if isinstance(batches, Iterator) else batches
    weights = prunable_weights(model)
    chosen = choose_patterns(weights, recipe, type(model).__name__)
    for name, pattern in chosen.items():
        check_pattern(weights[name], pattern)

    def build(patterns: Mapping[str, Pattern]) -> nn.Module:
        return prune_to(model, patterns, batches, progress=progress, max_memory=max_memory)

    data = Data(model, batches, progress, max_memory, debug.settings().cache)
    groups = _groups(weights, chosen, by)
    asked = Asked(weights, chosen, list(dict.fromkeys(choices)), groups, metric, build)
    whole, layers = scan(data, asked)
    facts = {"choices": str(len(asked.choices)), "pruned alone": f"each {by}"}
    if whole.dense is not None:
        facts |= {"metric of the dense model": f"{whole.dense:.6g}, lower is better"}
    return SensitivityReport(type(model).__name__, whole, layers, facts)


def _check(recipe: object, choices: object, by: str) -> None:
    if not isinstance(recipe, Recipe):
        raise UnknownOption(option="recipe", value=recipe, known="a sparsefx.Recipe")
    known = "a sequence of patterns, such as NM(2, 4), at least one"
    if isinstance(choices, str) or not isinstance(choices, Sequence) or not choices:
        raise UnknownOption(option="choices", value=choices, known=known)
    for choice in choices:
        if not isinstance(choice, Pattern):
            raise UnknownOption(option="choices", value=choice, known=known)
    if by not in GROUPS:
        raise UnknownOption(option="by", value=by, known=", ".join(GROUPS))


def _groups(
    weights: Mapping[str, PrunableWeight], chosen: Mapping[str, Pattern], by: str
) -> dict[str, str]:
    """Of each weight, what is pruned with it: itself, or its repeated block if it has one."""
    if by == "weight":
        return {name: name for name in chosen}
    blocks = blocks_of({name: weights[name] for name in chosen})
    return {name: block or name for name, block in blocks.items()}
