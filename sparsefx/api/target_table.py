"""The targets by name, and which of them a model and a guard allow."""

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sparsefx.codegen.cpp import TARGET_KERNELS as CPP_KERNELS
from sparsefx.codegen.cpp.attention.kernels import ATTENTION_KERNELS as CPP_ATTENTION
from sparsefx.codegen.cpp.conv import CONV_KERNELS as CPP_CONVOLUTIONS
from sparsefx.codegen.cuda_library import LIBRARY_KERNELS
from sparsefx.codegen.triton import precompile
from sparsefx.codegen.triton.attention.decode_kernels import DECODE_KERNELS
from sparsefx.codegen.triton.attention.kernels import PREFILL_KERNELS
from sparsefx.codegen.triton.kernels import kernels as triton_kernels
from sparsefx.errors import DeviceMismatch, TargetUnavailable, UnknownOption, UnknownTarget
from sparsefx.target import Target

GUARDS = ("measure", "model", "off")


def announce_cpp() -> None:
    """Of packed linears on the CPU."""
    from sparsefx.codegen.cpp import inductor  # imports Inductor: slow, and not all need it

    inductor.register()


@functools.cache
def targets() -> Mapping[str, Target]:
    """The targets by name. "a100" and its like plan for a GPU that need not be present."""
    linear = (*triton_kernels(), *LIBRARY_KERNELS)
    attention = (*PREFILL_KERNELS, *DECODE_KERNELS)
    planned = {
        name: Target(name, "cuda", linear, name, attention)
        for name in ("a100", "h100", "h200", "l4")
    }
    return {
        "cpu": Target(
            "cpu",
            "cpu",
            CPP_KERNELS,
            attention=CPP_ATTENTION,
            convolutions=CPP_CONVOLUTIONS,
            announce=announce_cpp,
        ),
        "cuda": Target("cuda", "cuda", linear, attention=attention, inspect=precompile.inspect),
        **planned,
    }


def choose_target(target: object, place: nn.Module | torch.device) -> Target:
    """The target asked for; None takes the device of `place`. Raises UnknownTarget."""
    if isinstance(target, Target):
        return target
    name = device_type(place) if target is None else target
    if not isinstance(name, str) or name not in targets():
        raise UnknownTarget(name=name, known=", ".join(targets()))
    return targets()[name]


def device_type(place: nn.Module | torch.device) -> str:
    """The torch device type of a model's first parameter, or of a device."""
    if isinstance(place, torch.device):
        return place.type
    first = next(place.parameters(), None)
    return "cpu" if first is None else first.device.type


def device_of(inputs: Sequence[object]) -> torch.device:
    """Where the weights, or else the tensors, among a graph's inputs are."""
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    parameters = [tensor for tensor in tensors if isinstance(tensor, nn.Parameter)]
    return (parameters or tensors)[0].device if tensors else torch.device("cpu")


def check_guard(guard: object, target: Target) -> None:
    """Raises UnknownOption, or TargetUnavailable where there is nothing to measure on."""
    if guard not in GUARDS:
        raise UnknownOption(option="guard", value=guard, known=", ".join(GUARDS))
    if guard == "measure" and (target.roofline or not target.present()):
        raise TargetUnavailable(name=target.name, device=target.roofline or target.device)


def check_device(model: nn.Module, target: Target, guard: str) -> None:
    """A model elsewhere than its target can only be planned for, and only if that is absent."""
    device = device_type(model)
    planning = guard == "model" and device == "cpu"
    if device != target.device and not planning:
        raise DeviceMismatch(
            model_device=device, name=target.name, device=target.device, suggestion=device
        )
