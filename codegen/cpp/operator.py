"""The C++ half of sparsefx_cpp::linear: compiled once for a machine and its torch, then loaded.

It takes the calls that need nothing of Python (templates/operator.cpp). All others, and all where
it could not be built, go to the Python half (call.py; direct.py for calls past the dispatcher).
"""

import ctypes
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

from sparsefx.codegen.cpp import build
from sparsefx.codegen.cpp.emit import inlined
from sparsefx.errors import KernelBuildFailed

_NAME = "linear_operator"
_SOURCE = Path(__file__).parent / "templates" / "operator.cpp"


class SlowCalls(RuntimeWarning):
    """Kernels are called by way of Python, though they could be called without."""


class Operator:
    """The C++ half in this process, and the libraries of kernels that it is to know."""

    def __init__(self) -> None:
        self._building = threading.Lock()  # long: calls of other threads do not wait for it
        self._lock = threading.Lock()
        self._loaded: ctypes.CDLL | None = None
        self._refused = False
        self._kernels: dict[str, ctypes.CDLL] = {}

    def add(self, handle: str, kernel: ctypes.CDLL) -> None:
        """Calls of `handle` need no Python from now on, or once this is loaded.

        Loads what lies in the cache and builds nothing, so that a process which only runs compiled
        models does not wait for a compiler.
        """
        with self._lock:
            self._kernels[handle] = kernel
            if self._loaded is not None:
                self._tell(handle, kernel)
        self._load_from_cache()

    def builtin(self, name: str, in_python: Callable[..., None]) -> Callable[..., None]:
        """The function `sparsefx_direct_<name>` makes, which calls `in_python` where it must.

        `in_python` itself where there is no C++ half, or it was built without Python's headers.
        """
        self._load_from_cache()
        if self._loaded is None:
            return in_python
        try:
            make = ctypes.PyDLL(self._loaded._name)[f"sparsefx_direct_{name}"]
        except AttributeError:
            return in_python
        make.argtypes, make.restype = [ctypes.py_object], ctypes.py_object
        made: Callable[..., None] = make(in_python)
        return made

    def _load_from_cache(self) -> None:
        if self._loaded is None and not self._refused:
            path = build.library(build.for_torch(_NAME, _source()))
            if path is not None:
                self._fault(path)

    def ready(self) -> None:
        """Builds and loads it, unless that is done; warns once if it cannot be."""
        with self._building:
            if self._loaded is not None or self._refused:
                return
            try:
                path = build.build_for_torch(_NAME, _source())
                fault = self._fault(path)
                if fault:  # whole, but made where there were other system libraries
                    path.unlink()
                    fault = self._fault(build.build_for_torch(_NAME, _source()))
            except (KernelBuildFailed, OSError) as error:
                fault = str(error)
            if fault:
                self._refuse(fault)

    def _fault(self, path: Path) -> str:
        """Loads it and tells it of all kernels; "", or why it cannot be loaded."""
        with self._lock:
            if self._loaded is not None:
                return ""
            try:
                loaded = ctypes.CDLL(str(path))
            except OSError as error:
                return str(error)
            loaded.sparsefx_add.argtypes = [ctypes.c_char_p, ctypes.c_void_p]
            loaded.sparsefx_add.restype = None
            self._loaded = loaded
            for handle, kernel in self._kernels.items():
                self._tell(handle, kernel)
            return ""

    def _tell(self, handle: str, kernel: ctypes.CDLL) -> None:
        assert self._loaded is not None
        self._loaded.sparsefx_add(handle.encode(), kernel._handle)

    def _refuse(self, reason: str) -> None:
        self._refused = True
        warnings.warn(
            f"each call of a C++ linear takes some microseconds more than it need: {reason}",
            SlowCalls,
            stacklevel=3,
        )


def _source() -> str:
    return inlined(_SOURCE)


OPERATOR = Operator()
"""The one of this process: torch takes a kernel for an operator once."""
