"""Find the order of a coupling's channels that N:M likes best, and put the channels in it."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from sparsefx.attributes import get_tensor
from sparsefx.errors import InvalidOrder
from sparsefx.prune.permute.coupling import Coupling, Member
from sparsefx.prune.permute.labels import NONE, ranks
from sparsefx.prune.permute.search import WORK, Found, find_order


def best_order(
    coupling: Coupling,
    scores: Mapping[str, Tensor],
    n: int,
    m: int,
    *,
    work: int = WORK,
    seed: int = 0,
) -> Found:
    """An order of the coupling's channels under which N:M keeps most of its consumers' scores.

    scores: by parameter name, [rows, channels of the input axis], at least 0; consumers that are
    not N:M are left out. Blocks whose places in a consumer are not whole groups of m keep their
    order. work: comparisons, shared out over the blocks by size. before, after: sums over the
    blocks that were searched. Never less is kept than before.
    """
    order = torch.arange(coupling.channels)
    problems = list(_problems(coupling, scores, m))
    cost = [float(len(own)) ** 2 * sum(map(len, matrices)) for own, matrices in problems]
    before = after = 0.0
    for (own, matrices), share in zip(problems, cost, strict=True):
        found = find_order(matrices, n, m, work=int(work * share / sum(cost)), seed=seed)
        order[own] = own[found.order.cpu()]
        before, after = before + found.before, after + found.after
    return Found(order, before, after)


def _problems(
    coupling: Coupling, scores: Mapping[str, Tensor], m: int
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """For each block its channels in the order of their places, and a matrix for each copy."""
    for block in range(int(coupling.blocks.max()) + 1):
        own: Tensor | None = None
        matrices = []
        for consumer in coupling.consumers:
            if consumer.name not in scores:
                continue
            for places in _copies(consumer, coupling.blocks, block):
                labels = consumer.labels[places]
                own = labels if own is None else own
                if not torch.equal(labels, own) or not _whole_groups(places, m):
                    own = None
                    break
                matrix = scores[consumer.name]
                matrices.append(matrix[:, places.to(matrix.device)])
            if own is None:
                break
        if own is not None:
            yield own, matrices


def _copies(consumer: Member, blocks: Tensor, block: int) -> Iterator[Tensor]:
    """The places of a block's channels in a consumer, rising, copy by copy."""
    held = consumer.labels != NONE
    inside = held & (torch.where(held, blocks[consumer.labels], NONE) == block)
    copies = ranks(consumer.labels)
    for copy in copies[inside].unique():
        yield (inside & (copies == copy)).nonzero().flatten()


def _whole_groups(places: Tensor, m: int) -> bool:
    if len(places) % m:
        return False
    groups = places.view(-1, m)
    return bool(((groups == groups[:, :1] + torch.arange(m)) & (groups[:, :1] % m == 0)).all())


def permuted(coupling: Coupling, order: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """New values, by name, of the coupling's members, all of which `tensors` must have.

    Raises InvalidOrder.
    """
    _check(coupling, order)
    return {
        member.name: tensors[member.name]
        .detach()
        .index_select(member.axis, member.index(order).to(tensors[member.name].device))
        for member in coupling.members
    }


def permute(model: nn.Module, coupling: Coupling, order: Tensor) -> None:
    """Puts the channels of a coupling in `order`, int64 [channels], in place.

    Channel order[i] goes where channel i was. What the model computes stays the same up to
    rounding. Raises InvalidOrder, before anything is written.
    """
    tensors = {member.name: get_tensor(model, member.name) for member in coupling.members}
    with torch.no_grad():
        for name, value in permuted(coupling, order, tensors).items():
            tensors[name].copy_(value)


def _check(coupling: Coupling, order: Tensor) -> None:
    """An order of another coupling would change the function without a sound."""
    expected = torch.arange(coupling.channels)
    stays = coupling.blocks == NONE
    legal = (
        torch.equal(order.sort().values, expected)
        and torch.equal(coupling.blocks[order], coupling.blocks)
        and torch.equal(order[stays], expected[stays])
    )
    if not legal:
        raise InvalidOrder(name=coupling.consumers[0].name, channels=coupling.channels)
