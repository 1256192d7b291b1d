"""Several processes, each with batches of its own, that decide as one: torch.distributed.

Without an initialised process group, or in a group of one, everything here does nothing.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sparsefx.errors import PeerFailed

T = TypeVar("T")


def several() -> bool:
    """Whether there are other processes to agree with."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first() -> bool:
    """Whether this process is the one whose decisions hold, and that writes the state."""
    return rank() == 0


def rank() -> int:
    """The number of this process, 0 where it is alone."""
    return dist.get_rank() if several() else 0


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replaces each tensor by its sum over all processes."""
    if not several():
        return
    for tensor in tensors:
        sent = tensor.to(_device())
        dist.all_reduce(sent)
        tensor.copy_(sent)


def share_tensors(tensors: Iterable[Tensor]) -> None:
    """Replaces each tensor by that of the first process."""
    if not several():
        return
    for tensor in tensors:
        sent = tensor.to(_device()).contiguous()
        dist.broadcast(sent, 0)
        tensor.copy_(sent)


def share_json(value: T) -> T:
    """The first process's `value`, anything that JSON can say; not pickled."""
    if not several():
        return value
    content = json.dumps(value).encode() if is_first() else b""
    size = torch.tensor([len(content)], device=_device())
    dist.broadcast(size, 0)
    sent = torch.zeros(int(size), dtype=torch.uint8, device=_device())
    if is_first():
        sent.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    dist.broadcast(sent, 0)
    shared: T = json.loads(bytes(sent.cpu().tolist()))
    return shared


def check_equal(what: Mapping[str, object]) -> None:
    """Raises PeerFailed, in every process, unless `what` is the same in all."""
    if not several():
        return
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).digest()
    number = int.from_bytes(digest[:7], "big")
    least, most = (torch.tensor([number], device=_device()) for _ in range(2))
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    if int(least) != int(most):
        raise PeerFailed(rule=f"processes differ in {', '.join(what)}")


@contextlib.contextmanager
def all_or_none(doing: str) -> Iterator[None]:
    """Raises PeerFailed where only another process raised inside, so that none waits forever."""
    failed = True
    try:
        yield
        failed = False
    finally:
        if several():
            count = torch.tensor([int(failed)], device=_device())
            dist.all_reduce(count)
            if int(count) and not failed:
                raise PeerFailed(rule=f"another process failed while {doing}")


def _device() -> torch.device:
    """Where the process group takes tensors."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
