"""The loss of a model on calibration batches, for allocations that ask how it moves."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from sparsefx.calibrate.door import call_with
from sparsefx.entry import inferring
from sparsefx.errors import UnknownOption


def losses_of(model: nn.Module, batches: Iterable[object]) -> tuple[Callable[[int], float], int]:
    """Batch number -> the model's loss on it, and how many batches there are.

    The loss is the output's own `loss`, where batches bring labels, else that of predicting each
    next token, for a model of logits [batch, length, vocabulary] called with `input_ids`. In eval
    mode, without gradients. Raises UnknownOption for a model that gives neither.
    """
    kept = list(batches)

    def loss(number: int) -> float:
        with inferring(model), torch.no_grad():
            return float(_loss(call_with(model, kept[number]), kept[number]))

    return loss, len(kept)


def _loss(output: object, batch: object) -> Tensor:
    given = getattr(output, "loss", None)
    if isinstance(given, Tensor):
        return given
    logits = getattr(output, "logits", None)
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(logits, Tensor) or not isinstance(ids, Tensor) or logits.dim() != 3:
        known = "a model whose output has `loss`, or `logits` for batches with input_ids"
        raise UnknownOption(option="ZerothOrder on", value=type(output).__name__, known=known)
    targets = ids[:, 1:]
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor):
        targets = targets.masked_fill(mask[:, 1:] == 0, -100)
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten())
