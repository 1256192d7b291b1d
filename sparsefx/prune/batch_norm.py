"""reestimate_batch_norm(): the statistics of batch norms, taken again after pruning."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparsefx.calibrate.door import call_with
from sparsefx.entry import inferring
from sparsefx.errors import EmptyCalibration, NonFiniteActivation, ShapeMismatch

Norms = dict[str, _BatchNorm]


def reestimate_batch_norm(
    model: nn.Module, batches: Iterable[object], dense: nn.Module | None = None
) -> int:
    """Sets every batch norm's running mean and variance to what pruning made of them, in place.

    A pruned convolution gives other means and variances than those that the norm behind it learned.
    batches: as for `sparsify`'s calibration; larger ones are better. dense: the model before it was
    pruned, whose statistics on the same batches are compared: means move by the difference and
    variances by the ratio, so that what a few batches do not know of the training data stays.
    Without it the plain mean over `batches` takes the place of what was learned, which asks for
    thousands of samples. Everything else runs in eval mode, without gradients. Weights do not
    change, nor does `dense`. Norms that keep no running statistics are left out.

    Returns how many norms were set. Raises EmptyCalibration, NonFiniteActivation, and ShapeMismatch
    for a `dense` with other norms, after which the norms are as before.
    """
    norms = _norms(model)
    learned = {name: _copy(norm) for name, norm in norms.items()}
    kept = list(batches)
    start = None if dense is None else _measured_on(dense, kept, norms)
    with _restored(norms, always=False):
        _measure(model, norms, kept)
        if start is not None:
            _compare(norms, learned, start)
    return len(norms)


def _norms(model: nn.Module) -> Norms:
    return {
        name: norm
        for name, norm in model.named_modules()
        if isinstance(norm, _BatchNorm) and norm.track_running_stats
    }


def _copy(norm: nn.Module) -> dict[str, Tensor]:
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


def _measured_on(
    dense: nn.Module, batches: list[object], like: Norms
) -> dict[str, dict[str, Tensor]]:
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
    if not batches:
        raise EmptyCalibration()
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over the batches
    with inferring(model), torch.no_grad():
        for norm in norms.values():
            norm.training = True
        try:
            for number, batch in enumerate(batches):
                call_with(model, batch)
                _check(norms, number)
        finally:
            for norm in norms.values():
                norm.training = False


def _compare(
    norms: Norms, learned: dict[str, dict[str, Tensor]], dense: dict[str, dict[str, Tensor]]
) -> None:
    """Means and variances learned, moved as those on the batches have moved from the dense ones."""
    for name, norm in norms.items():
        assert norm.running_mean is not None and norm.running_var is not None
        before, start = learned[name], dense[name]
        tiny = torch.finfo(norm.running_var.dtype).tiny
        ratio = norm.running_var / start["running_var"].clamp(min=tiny)
        alive = start["running_var"] > norm.eps  # a channel that is constant tells nothing
        norm.running_mean.copy_(before["running_mean"] + norm.running_mean - start["running_mean"])
        norm.running_var.copy_(before["running_var"] * torch.where(alive, ratio, 1))


def _check(norms: Norms, batch: int) -> None:
    for name, norm in norms.items():
        assert norm.running_mean is not None and norm.running_var is not None
        if not (norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()):
            raise NonFiniteActivation(name=name, batch=batch)
