"""The loss of a model on calibration batches, for allocations that ask how it moves."""

import inspect
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
    next token, for a causal language model of logits [batch, length, vocabulary] that takes
    `input_ids`. In eval mode, without gradients. Raises UnknownOption for a model that gives
    neither.
    """
    kept = [by_name(model, batch) for batch in batches]

    def loss(number: int) -> float:
        with inferring(model), torch.no_grad():
            output = call_with(model, kept[number])
            found = loss_of(output, kept[number])
        if found is None:
            known = "a model whose output has `loss`, or `logits` for batches with input_ids"
            raise UnknownOption(option="ZerothOrder on", value=type(output).__name__, known=known)
        return float(found)

    return loss, len(kept)


def loss_of(output: object, batch: object, reduction: str = "mean") -> Tensor | None:
    """The loss of one output of a model, as `losses_of` has it; None if it gives neither.

    reduction: "mean" or "sum" over the tokens that are predicted; a loss of its own is as it is.
    """
    given = getattr(output, "loss", None)
    if isinstance(given, Tensor):
        return given
    logits = getattr(output, "logits", None)
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(logits, Tensor) or not isinstance(ids, Tensor) or not _predicts(output):
        return None
    if logits.dim() != 3 or logits.shape[:2] != ids.shape:
        return None
    targets = ids[:, 1:]
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor):
        targets = targets.masked_fill(mask[:, 1:] == 0, -100)
    predicted = logits[:, :-1].flatten(0, 1).float()
    return cross_entropy(predicted, targets.flatten(), reduction=reduction)


def _predicts(output: object) -> bool:
    """Whether logits are of the next tokens: transformers says so in its outputs' names."""
    kind = type(output)
    return not kind.__module__.startswith("transformers.") or "CausalLM" in kind.__name__


def by_name(model: nn.Module, batch: object) -> object:
    """A batch of positional arguments as a dict of keyword arguments, if the model names them."""
    args = batch if isinstance(batch, tuple | list) else (batch,)
    if isinstance(batch, Mapping):
        return batch
    names = []
    for each in inspect.signature(model.forward).parameters.values():
        if each.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            break
        names.append(each.name)
    return dict(zip(names, args, strict=False)) if len(args) <= len(names) else batch
