"""C++ source -> shared library in the cache: compiled once, named by content, written atomically.

The name (handle) is the hash of source, flags and compiler, so that it means the same in another
process. Where the cache cannot be written, a private temporary folder takes its place. A damaged
library would kill the process that loads it, so each lies beside its hash and is read only whole.
"""

import ctypes
import functools
import hashlib
import os
import re
import shutil
import stat
import subprocess
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from sparsefx.debug import settings
from sparsefx.errors import KernelBuildFailed, KernelNotFound
from sparsefx.files import write_atomically

_MATH = ("-fno-math-errno", "-fno-trapping-math")  # without either, loops are vectorised
_COMMON = ("-O3", "-std=c++17", "-fPIC", *_MATH, "-Wno-psabi")
_FLAGS = (*_COMMON, "-shared", "-fopenmp")
_TORCH_FLAGS = ("-O2", "-std=c++20", "-fPIC", "-shared")


@dataclass(frozen=True)
class Compiler:
    """A g++ on this machine: where it is and the first line of `g++ --version`."""

    path: str
    version: str


def compiler() -> Compiler | None:
    """The g++ on PATH, or None."""
    path = shutil.which("g++")
    return Compiler(path, _version(path)) if path else None


def build(kernel: str, source: str, isa_flags: tuple[str, ...]) -> tuple[str, Path]:
    """The handle and the place of the library made of `source`; compiled unless the cache has it.

    `kernel` starts the handle and names the kernel in errors. Raises KernelBuildFailed.
    """
    return _built(kernel, source, (*_FLAGS, *isa_flags, *_openmp()), ".so")


def build_for_torch(kernel: str, source: str) -> Path:
    """The place of the library made of `source`, which uses torch's C++; cached likewise.

    Its handle (`for_torch`) is not of the compiler, so that it is found where there is none. Raises
    KernelBuildFailed.
    """
    name = f"{for_torch(kernel, source)}.so"
    return _found(name) or _store(name, source, _compile(kernel, source, _torch_flags()))


def for_torch(kernel: str, source: str) -> str:
    """The handle of what `build_for_torch` makes: of the source, and where which torch lies."""
    return f"{kernel}_{_digest(source, *_torch_flags(), torch.__version__)}"


def build_object(kernel: str, source: str, isa_flags: tuple[str, ...]) -> Path:
    """The place of the object file made of `source`, a part of a library; cached likewise.

    No OpenMP; nothing in it is visible from outside the library unless it says so. Raises
    KernelBuildFailed.
    """
    return _built(kernel, source, (*_COMMON, "-c", "-fvisibility=hidden", *isa_flags), ".o")[1]


def library(handle: str) -> Path | None:
    """Where the library called `handle` lies whole, its source beside it as .cpp, or None."""
    return _found(f"{handle}.so")


def opened(handle: str, function: str) -> ctypes.CDLL:
    """The library called `handle`, which has `function`, in this process. Raises KernelNotFound."""
    path = library(handle) if re.fullmatch(r"\w+", handle) else None
    if path is None:
        raise KernelNotFound(handle=handle)
    try:
        found = ctypes.CDLL(str(path))
        getattr(found, function)
    except (OSError, AttributeError):  # not for this machine, or of another kind of kernel
        raise KernelNotFound(handle=handle) from None
    return found


def _built(kernel: str, source: str, flags: tuple[str, ...], suffix: str) -> tuple[str, Path]:
    found = compiler()
    version = found.version if found else ""
    handle = f"{kernel}_{_digest(source, *flags, version)}"
    name = handle + suffix
    return handle, _found(name) or _store(name, source, _compile(kernel, source, flags))


def _found(name: str) -> Path | None:
    paths = (folder / name for folder in _folders())
    return next((path for path in paths if _is_whole(path)), None)


def _is_whole(path: Path) -> bool:
    """Whether the library is there, byte for byte as it was written."""
    try:
        return path.with_suffix(".sha256").read_bytes() == _hash(path.read_bytes())
    except OSError:  # either is missing or cannot be read
        return False


def _hash(binary: bytes) -> bytes:
    return hashlib.sha256(binary).hexdigest().encode()


def _folders() -> tuple[Path, Path]:
    return settings().cache / "cpp", _private_folder()


def _store(name: str, source: str, binary: bytes) -> Path:
    cache, private = _folders()
    try:
        return _write(cache / name, source, binary)
    except OSError:  # read-only, full, or not a folder
        return _write(private / name, source, binary)


def _write(path: Path, source: str, binary: bytes) -> Path:
    """The hash goes last: a library counts from then on, and its source is there too."""
    write_atomically(path.with_suffix(".cpp"), source.encode())
    write_atomically(path, binary)
    write_atomically(path.with_suffix(".sha256"), _hash(binary))
    return path


def _compile(kernel: str, source: str, flags: tuple[str, ...]) -> bytes:
    found = compiler()
    if found is None:
        raise KernelBuildFailed(kernel=kernel, rule="no g++ on PATH")
    with tempfile.TemporaryDirectory(prefix="sparsefx") as folder:
        path, result = Path(folder, "kernel.cpp"), Path(folder, "kernel")
        path.write_text(source)
        # The source comes before the libraries, or the linker drops those as not needed.
        line = (found.path, str(path), "-o", str(result), *flags)
        done = subprocess.run(line, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            raise KernelBuildFailed(kernel=kernel, rule=done.stderr.strip()[:2000])
        return result.read_bytes()


def _openmp() -> tuple[str, ...]:
    """Links the OpenMP runtime that torch brings, if it brings one.

    A second runtime would be a second pool of threads, and two pools that spin stall each other
    for milliseconds. -fopenmp alone asks for libgomp.so.1; torch's may have another soname.
    """
    package = Path(torch.__file__).parent
    folders = (package / "lib", package.parent / "torch.libs")
    found = sorted(path for folder in folders for path in folder.glob("libgomp*.so*"))
    return ("-Wl,--as-needed", str(found[0])) if found else ()


def _torch_flags() -> tuple[str, ...]:
    package = Path(torch.__file__).parent
    python = Path(sysconfig.get_path("include"))  # empty where Python came without its headers
    headers = (package / "include", package / "include/torch/csrc/api/include", python)
    found = (word for folder in headers for word in ("-isystem", str(folder)))
    return (*_TORCH_FLAGS, *found, f"-L{package / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch_python")


@functools.cache
def _version(path: str) -> str:
    done = subprocess.run((path, "--version"), capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0]


@functools.cache
def _private_folder() -> Path:
    """A folder that only this user can write: libraries are loaded from it."""
    folder = Path(tempfile.gettempdir()) / f"sparsefx-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        info = folder.lstat()
        if stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o022:
            return folder
    except OSError:  # a file of that name: someone else's, so take a new name
        pass
    return Path(tempfile.mkdtemp(prefix="sparsefx-"))


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
