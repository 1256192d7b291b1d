"""reestimate_batch_norm(): the statistics of batch norms, taken again after pruning."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparsefx.calibrate.batches import check_batches
from sparsefx.calibrate.door import call_with
from sparsefx.entry import inferring
from sparsefx.errors import NonFiniteActivation, ShapeMismatch, TooFewValues, UnknownOption

Norms = dict[str, _BatchNorm]
Statistics = dict[str, Tensor]
"""Of one norm: running_mean and running_var [channels], num_batches_tracked []."""


def reestimate_batch_norm(
    model: nn.Module, batches: Iterable[object], dense: nn.Module | None = None
) -> int:
    """Sets every batch norm's running mean and variance to what pruning made of them, in place.

    A pruned convolution gives other means and variances than those that the norm behind it learned.
    batches: as for `sparsify`'s calibration; larger ones are better. dense: the model before it was
    pruned, whose statistics on the same batches are compared: a variance takes part in the ratio of
    both, and a mean stays as many standard deviations from that on the batches as it was learned to
    be, so that what a few batches do not know of the training data stays, at the scale that pruning
    has left; num_batches_tracked stays too. Without it the plain mean over `batches` takes the
    place of what was learned, which asks for thousands of samples. Everything else runs in eval
    mode, without gradients. Weights do not change, nor does `dense`. Norms that no batch runs, or
    that keep no running statistics, are left as they are.

    Under torch.distributed it works on this process's own batches: give all processes the same, or
    send the buffers of one to the others.

    Returns how many norms were set. Raises UnknownOption, EmptyCalibration, TooFewValues for a norm
    that sees one value per channel, NonFiniteActivation, and ShapeMismatch for a `dense` with other
    norms, after which the norms are as before.
    """
    _check_models(model, dense)
    kept = list(check_batches(batches, "batches"))
    norms = _norms(model)
    learned = {name: _copy(norm) for name, norm in norms.items()}
    start = None if dense is None else _measured_on(dense, kept, norms)
    with _restored(norms, always=False):
        _measure(model, norms, kept)
        after = {name: _copy(norm) for name, norm in norms.items()}
        ran = {name for name in norms if _ran(after[name]) and _ran((start or after)[name])}
        for name, norm in norms.items():
            if name not in ran:
                norm.load_state_dict(learned[name], strict=False)
            elif start is not None:
                _compare(norm, learned[name], start[name])
    return len(ran)


def _check_models(model: object, dense: object) -> None:
    for option, given in (("model", model), ("dense", dense)):
        if not isinstance(given, nn.Module) and not (option == "dense" and given is None):
            known = "an nn.Module; for dense, the model before it was pruned, or None"
            raise UnknownOption(option=option, value=type(given).__name__, known=known)


def _ran(statistics: Statistics) -> bool:
    return bool(statistics["num_batches_tracked"] > 0)


def _norms(model: nn.Module) -> Norms:
    return {
        name: norm
        for name, norm in model.named_modules()
        if isinstance(norm, _BatchNorm) and norm.track_running_stats
    }


def _copy(norm: nn.Module) -> Statistics:
    return {name: buffer.clone() for name, buffer in norm.named_buffers()}


@contextmanager
def _restored(norms: Norms, *, always: bool) -> Iterator[None]:
    """Statistics as they were after an exception, or `always`; momenta in any case."""
    before = {name: _copy(norm) for name, norm in norms.items()}
    momenta = {name: norm.momentum for name, norm in norms.items()}
    done = False
    try:
        yield
        done = not always
    finally:
        for name, norm in norms.items():
            norm.momentum = momenta[name]
            if not done:
                norm.load_state_dict(before[name], strict=False)


def _measured_on(dense: nn.Module, batches: list[object], like: Norms) -> dict[str, Statistics]:
    """The statistics of `dense` on the batches; it is as it was afterwards."""
    norms = _norms(dense)
    shapes = {name: norm.num_features for name, norm in norms.items()}
    if shapes != {name: norm.num_features for name, norm in like.items()}:
        raise ShapeMismatch(
            name="dense",
            shape=f"{len(shapes)} batch norms",
            rule="it has the batch norms of the pruned model",
            remedy="Pass the model that was pruned, or a copy of it",
        )
    with _restored(norms, always=True):
        _measure(dense, norms, batches)
        return {name: _copy(norm) for name, norm in norms.items()}


def _measure(model: nn.Module, norms: Norms, batches: list[object]) -> None:
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over the batches
    with inferring(model), torch.no_grad():
        for norm in norms.values():
            norm.training = True
        try:
            for number, batch in enumerate(batches):
                with _several_values(norms, number):
                    call_with(model, batch)
                _check(norms, number)
        finally:
            for norm in norms.values():
                norm.training = False


@contextmanager
def _several_values(norms: Norms, batch: int) -> Iterator[None]:
    """Raises TooFewValues where a norm is to take a variance of less than two values."""

    def check(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        (x,) = args
        values = x.numel() // max(1, x.shape[1]) if x.dim() > 1 else x.numel()
        if values < 2:
            raise TooFewValues(name=name, batch=batch, values=values)

    hooks = [norm.register_forward_pre_hook(partial(check, name)) for name, norm in norms.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _compare(norm: _BatchNorm, learned: Statistics, dense: Statistics) -> None:
    """What was learned, in the scale and around the mean that the batches have after pruning.

    (learned mean - dense mean) / dense std is kept: a difference left as it is would be divided by
    the tiny std of a channel that pruning has all but silenced.
    """
    assert norm.running_mean is not None and norm.running_var is not None
    assert norm.num_batches_tracked is not None
    tiny = torch.finfo(norm.running_var.dtype).tiny
    alive = dense["running_var"] > norm.eps  # a channel that is constant tells nothing
    moved = norm.running_var / dense["running_var"].clamp(min=tiny)
    ratio = torch.where(alive, moved, 1)
    shift = learned["running_mean"] - dense["running_mean"]
    norm.running_mean.add_(ratio.sqrt() * shift)
    norm.running_var.copy_(learned["running_var"] * ratio)
    norm.num_batches_tracked.copy_(learned["num_batches_tracked"])


def _check(norms: Norms, batch: int) -> None:
    for name, norm in norms.items():
        assert norm.running_mean is not None and norm.running_var is not None
        if not (norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()):
            raise NonFiniteActivation(name=name, batch=batch)
