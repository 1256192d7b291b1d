"""reestimate_batch_norm(): the statistics of batch norms, taken again after pruning."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparsefx.calibrate.door import call_with
from sparsefx.entry import inferring
from sparsefx.errors import EmptyCalibration, NonFiniteActivation


def reestimate_batch_norm(model: nn.Module, batches: Iterable[object]) -> int:
    """Sets every batch norm's running mean and variance to those of `batches`, in place.

    A pruned convolution gives other means and variances than those that the norm behind it learned;
    the mean over `batches` (each as for `sparsify`'s calibration; larger ones are better) takes
    their place. Everything else runs in eval mode, without gradients. Weights do not change. Norms
    that keep no running statistics are left out.

    Returns how many norms were set. Raises EmptyCalibration and NonFiniteActivation, after which
    the norms are as before.
    """
    norms = {
        name: norm
        for name, norm in model.named_modules()
        if isinstance(norm, _BatchNorm) and norm.track_running_stats
    }
    before = {name: _copy(norm) for name, norm in norms.items()}
    momenta = {name: norm.momentum for name, norm in norms.items()}
    try:
        _measure(model, norms, batches)
    except BaseException:
        for name, norm in norms.items():
            norm.load_state_dict(before[name], strict=False)
        raise
    finally:
        for name, norm in norms.items():
            norm.momentum = momenta[name]
    return len(norms)


def _copy(norm: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in norm.named_buffers()}


def _measure(model: nn.Module, norms: dict[str, _BatchNorm], batches: Iterable[object]) -> None:
    for norm in norms.values():
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over the batches
    count = 0
    with inferring(model), torch.no_grad():
        for norm in norms.values():
            norm.training = True
        try:
            for batch in batches:
                call_with(model, batch)
                _check(norms, count)
                count += 1
        finally:
            for norm in norms.values():
                norm.training = False
    if not count:
        raise EmptyCalibration()


def _check(norms: dict[str, _BatchNorm], batch: int) -> None:
    for name, norm in norms.items():
        assert norm.running_mean is not None and norm.running_var is not None
        if not (norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()):
            raise NonFiniteActivation(name=name, batch=batch)
