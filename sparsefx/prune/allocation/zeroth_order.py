"""How much the loss moves with each weight tensor, without gradients (ECoFLaP, arXiv 2310.02998).

    z ~ N(0, 1)      g = |L(W + epsilon z) - L(W - epsilon z)| / (2 epsilon)      G = mean g

G estimates the mean of |z . dL/dW|, which is sqrt(2 / pi) times the gradient's norm. The paper sums
where this takes the mean: a constant factor, which proportions do not see.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from sparsefx.allocations import ZerothOrder
from sparsefx.calibrate import together
from sparsefx.errors import EmptyCalibration, NonFiniteLoss

Loss = Callable[[int], float]
"""The model's loss on the batch of a number."""


def zeroth_order_scores(
    parameters: Mapping[str, Tensor],
    loss: Loss,
    batches: int,
    options: ZerothOrder,
    done: Callable[[str], None] | None = None,
) -> dict[str, float]:
    """The score of each tensor by name, as `options.score` says.

    parameters: tensors of the model that `loss` runs; each is perturbed in place and then put back
    bit for bit, after an exception too; memory beyond the model is two copies of one tensor. Draw
    i runs batch i mod `batches`. The noise of a tensor depends on options.seed, its name and the
    draw, not on the other tensors nor on torch's global generator. done: told each name when its
    losses are known.

    Under torch.distributed each process runs batches of its own, and G is the mean over all: every
    process has the same scores. Raises EmptyCalibration without batches, NonFiniteLoss, and
    PeerFailed.
    """
    moved = {}
    with together.all_or_none("measuring losses"):
        if batches < 1:
            raise EmptyCalibration()
        for name, parameter in parameters.items():
            moved[name] = _sensitivity(name, parameter, loss, batches, options)
            if done is not None:
                done(name)
    means = _mean_over_processes(list(moved.values()))
    return {
        name: _score(parameters[name], mean, options.score)
        for name, mean in zip(moved, means, strict=True)
    }


def _mean_over_processes(values: list[float]) -> list[float]:
    sums = torch.tensor([*values, 1.0], dtype=torch.float64)
    together.add_up([sums])
    means: list[float] = (sums[:-1] / sums[-1]).tolist()
    return means


def _score(parameter: Tensor, moved: float, score: str) -> float:
    """G, mean |W| * G or mean W^2 * G^2."""
    weight = parameter.detach()
    match score:
        case "magnitude":
            return float(weight.abs().mean(dtype=torch.float64)) * moved
        case "square":
            return float(weight.float().square().mean(dtype=torch.float64)) * moved**2
        case _:
            return moved


def _sensitivity(
    name: str, parameter: Tensor, loss: Loss, batches: int, options: ZerothOrder
) -> float:
    """G of one tensor."""
    differences = []
    with restored(parameter) as original:
        for draw in range(options.samples):
            noise = options.epsilon * _noise(name, parameter, options.seed, draw)
            batch = draw % batches
            losses = []
            for step in (noise, -noise):
                parameter.copy_(original + step)
                losses.append(_finite(loss(batch), name, batch, options.epsilon))
            differences.append(abs(losses[0] - losses[1]) / (2 * options.epsilon))
    return math.fsum(differences) / len(differences)


@contextmanager
def restored(parameter: Tensor) -> Iterator[Tensor]:
    """A copy of `parameter`, which is written back at the end: W + z - z would not be W."""
    with torch.no_grad():
        original = parameter.detach().clone()
        try:
            yield original
        finally:
            parameter.copy_(original)


def _noise(name: str, parameter: Tensor, seed: int, draw: int) -> Tensor:
    """Standard normal float32 of the parameter's shape, the same on every device."""
    generator = torch.Generator().manual_seed(_mix(f"{seed} {draw} {name}"))
    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
    return noise.to(parameter.device)


def _mix(text: str) -> int:
    # Not hash(), which differs between processes.
    return zlib.crc32(text.encode())


def _finite(value: float, name: str, batch: int, epsilon: float) -> float:
    if not math.isfinite(value):
        raise NonFiniteLoss(loss=value, batch=batch, name=name, epsilon=epsilon)
    return value
