"""agreed(): the couplings that every process has found in the graphs of its own batches."""

import hashlib

import torch

from sparsefx.calibrate import together
from sparsefx.prune.permute.coupling import Coupling, Couplings
from sparsefx.rewrite import Decline

DISAGREED = "its channels are tied to others in another process"


def agreed(couplings: Couplings) -> Couplings:
    """The couplings of all processes of torch.distributed; others are declined with a reason.

    A process whose batches show other kinds of calls may tie the same channels to more weights.
    """
    if not together.several():
        return couplings
    own = [_key(coupling) for coupling in couplings.found]
    asked = together.share_json(own)
    votes = torch.tensor([*(key in own for key in asked), True], dtype=torch.int64)
    together.add_up([votes])
    kept = {key for key, count in zip(asked, votes.tolist(), strict=False) if count == votes[-1]}
    # The order of the first process, so that all walk through them alike.
    mine = dict(zip(own, couplings.found, strict=True))
    dropped = [coupling for key, coupling in mine.items() if key not in kept]
    lost = {each.name: Decline(DISAGREED) for coupling in dropped for each in coupling.consumers}
    found = tuple(mine[key] for key in asked if key in kept)
    return Couplings(found, {**couplings.declined, **lost})


def _key(coupling: Coupling) -> str:
    members = [(each.name, each.axis, each.labels.tolist()) for each in coupling.members]
    said = repr((coupling.blocks.tolist(), sorted(members)))
    return hashlib.sha256(said.encode()).hexdigest()
