"""What a generated library holds, as Python reads and calls it."""

import ctypes
from collections.abc import Callable

import torch


def function(found: ctypes.CDLL, name: str, pointers: int, sizes: int) -> Callable[..., int]:
    """Its function of so many addresses and int64 sizes, and of the number of threads."""
    run: Callable[..., int] = found[name]
    run.argtypes = [*[ctypes.c_void_p] * pointers, *[ctypes.c_int64] * sizes, ctypes.c_int32]  # type: ignore[attr-defined]
    run.restype = ctypes.c_int32  # type: ignore[attr-defined]
    return run


def numbers(found: ctypes.CDLL, count: int) -> list[int]:
    """What its function was specialised to, in the order of its template."""
    return list((ctypes.c_int32 * count).in_dll(found, "sparsefx_numbers"))


def dtype(found: ctypes.CDLL, name: str = "sparsefx_dtype") -> torch.dtype:
    """The torch type of the numbers that `name` is about; two int4 lie in a uint8."""
    text = (ctypes.c_char * 16).in_dll(found, name).value.decode()
    stored: torch.dtype = torch.uint8 if text == "int4" else getattr(torch, text)
    return stored
