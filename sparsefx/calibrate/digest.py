"""What identifies a calibration: the model, by samples of its weights, and what was asked."""

import hashlib
from collections.abc import Iterable

from torch import Tensor, nn


def digest(model: nn.Module, asked: Iterable[str]) -> str:
    """Of the model's class, each weight's name, shape, dtype and a sample, and of `asked`."""
    weights = (
        f"{name} {tuple(each.shape)} {each.dtype} {_sample(each)}"
        for name, each in model.named_parameters()
    )
    text = (type(model).__qualname__, *asked, *weights)
    return hashlib.sha256("\n".join(text).encode()).hexdigest()


def _sample(weight: Tensor) -> list[float]:
    """Values from all over a weight."""
    flat = weight.detach().flatten()
    values: list[float] = flat[:: max(flat.numel() // 16, 1)].double().tolist()
    return values
