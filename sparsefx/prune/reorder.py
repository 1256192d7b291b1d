"""reorder(): input channels in the order that N:M patterns like best; the function stays.

An order is shared by a weight's siblings and undone by its producers (prune.permute). Scores are
those of the criterion where it has none but sums of rows: |W| without data, |W| * ||X|| with data.
The function stays on calls of the kinds that the calibration batches show, no others: a call that
takes another branch, and reads the same producers there, is not known to the captured graphs.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, fx, nn

from sparsefx.calibrate import together
from sparsefx.calibrate.given import arguments_of, captured
from sparsefx.calibrate.sequential import Block, Visited
from sparsefx.entry import inferring
from sparsefx.patterns import NM, Pattern
from sparsefx.prune.measure import Data, facts_of_blocks
from sparsefx.prune.permute.agree import agreed
from sparsefx.prune.permute.apply import best_order, permute
from sparsefx.prune.permute.coupling import Coupling, find_couplings
from sparsefx.prune.wanda import wanda_scores
from sparsefx.prune.weights import PrunableWeight

# Comparisons of one coupling's search: four fifths of what five times as many would gain.
WORK = 200_000_000
KEPT = "its input channels keep their order: no other keeps more"


def reorder(
    data: Data, weights: Mapping[str, PrunableWeight], chosen: Mapping[str, Pattern]
) -> dict[str, str]:
    """Permutes channels of `data.model` in place, for the weights whose pattern is N:M.

    The order is found from the graphs of all kinds of batches, joined where they read the same
    weights; of several processes, where all have found the same coupling. Returns the name of each
    such weight with what became of it, in words: reordered, or why its channels keep their order;
    one that no batch reads keeps it, though a call that reads it may hang it on a producer that was
    reordered. Raises NotCapturable, PeerFailed and what the passes over the data raise; the model
    is unchanged after any of them.
    """
    assert data.batches is not None  # `permute` has asked for them
    with together.all_or_none("capturing the model's graphs"):
        couplings = find_couplings(_graphs(data.model, data.batches), data.model)
    couplings = agreed(couplings)
    asked = {name: each for name, each in chosen.items() if isinstance(each, NM)}
    scores = _scores(data, weights, asked)
    reasons = {name: str(why.reason) for name, why in couplings.declined.items() if name in asked}
    for coupling in couplings.found:
        reasons |= _reorder(data.model, coupling, scores, asked)
    return reasons


def _graphs(model: nn.Module, batches: Iterable[object]) -> list[fx.GraphModule]:
    """The model's graph for each kind of batch, the first of which it is captured with."""
    found: dict[str, fx.GraphModule] = {}
    with inferring(model):
        for number, batch in enumerate(batches):
            given = arguments_of(batch)
            if given.signature not in found:
                found[given.signature] = captured(model, given, number)
    return list(found.values())


def _reorder(
    model: nn.Module,
    coupling: Coupling,
    scores: Mapping[str, Tensor],
    asked: Mapping[str, NM],
) -> dict[str, str]:
    own = {each.name: asked[each.name] for each in coupling.consumers if each.name in asked}
    if not own:
        return {}
    groups = {(pattern.n, pattern.m) for pattern in own.values()}
    if len(groups) > 1:
        return dict.fromkeys(own, "its siblings, which share the order, have another N:M")
    ((n, m),) = groups
    found = best_order(coupling, {name: scores[name] for name in own}, n, m, work=WORK)
    permute(model, coupling, found.order)
    return dict.fromkeys(own, "its input channels were reordered" if found.gain else KEPT)


def _scores(
    data: Data, weights: Mapping[str, PrunableWeight], asked: Mapping[str, NM]
) -> dict[str, Tensor]:
    """Of each weight [rows, input channels], float32: taps of a convolution are rows."""
    by_data = [name for name, pattern in asked.items() if pattern.criterion.needs]
    norms: dict[str, list[Tensor]] = {}

    def visit(block: Block) -> Visited:
        for name, layer in block.layers.items():
            norms[name] = [part["squares"].norms for part in layer.statistics]  # type: ignore[attr-defined]
        return Visited()

    if by_data:
        facts_of_blocks(data, dict.fromkeys(by_data, frozenset({"squares"})), visit, "norms")
    found = {}
    for name in asked:
        parts = [part.float() for part in weights[name].matrices()]
        if name in norms:
            scores = [wanda_scores(*each) for each in zip(parts, norms[name], strict=True)]
        else:
            scores = [part.abs() for part in parts]
        found[name] = torch.cat(scores).reshape(-1, weights[name].fit_shape[1])
    return found
