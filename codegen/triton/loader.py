"""Imports generated kernels and launches them; imports Triton, so it is imported at first use."""

import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Protocol, cast

import torch
from torch import Tensor
from triton.errors import TritonError

from sparsefx.codegen.triton.form import Call
from sparsefx.errors import KernelBuildFailed


class Jitted(Protocol):
    """The part of a `triton.jit` function that is used here."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        """The kernel, ready to be called on a grid."""
        ...

    def warmup(self, *args: object, grid: tuple[int, ...], **options: object) -> object:
        """Compiles for these arguments without launching."""
        ...


def import_file(path: str) -> ModuleType:
    """The generated module that lies at `path`. Raises KernelBuildFailed."""
    spec = importlib.util.spec_from_file_location("sparsefx_generated_triton", path)
    if spec is None or spec.loader is None:
        raise KernelBuildFailed(kernel=path, rule="it is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def jitted(module: ModuleType, name: str = "kernel") -> Jitted:
    """One kernel of a generated module."""
    return cast(Jitted, getattr(module, name))  # a module's attributes have no static type


def run(handle: str, module: ModuleType, call: Call, beside: Tensor) -> None:
    """Launches one kernel on the device of `beside`.

    Raises KernelBuildFailed where Triton refuses the kernel on this device.
    """
    try:
        with torch.cuda.device_of(beside):
            jitted(module, call.kernel)[call.grid](*call.arguments, **call.options)
    except TritonError as error:
        raise KernelBuildFailed(kernel=handle, rule=str(error)) from error
