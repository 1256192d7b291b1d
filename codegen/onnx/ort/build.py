"""LinearSpecs -> one shared library that onnxruntime's register_custom_ops_library() loads.

It holds each kernel for several instruction sets and chooses when a session is made, so that it
may be carried to another machine with the model. It needs nothing but the C library there.
"""

import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sparsefx.codegen.cpp.build import build_object, compiler
from sparsefx.codegen.cpp.isa import PORTABLE, VECTOR_ISAS, Isa
from sparsefx.codegen.onnx.ort.emit import kernel_sources, operators_source
from sparsefx.errors import KernelBuildFailed
from sparsefx.target import LinearSpec

_X86 = ("x86_64", "AMD64")
_LINK = ("-shared", "-static-libstdc++", "-static-libgcc", "-Wl,-z,defs", "-Wl,--gc-sections", "-s")
# Its C++ is its own: other libraries of the process must not mistake it for theirs.
_EXPORTS = "{ global: RegisterCustomOps; local: *; };"


def build_library(specs: Sequence[LinearSpec], path: Path, isas: Sequence[Isa] = ()) -> int:
    """Writes the library with the kernels for `specs` to `path`; returns how many kernels it has.

    isas: instruction sets, best first; () is all that this kind of processor may have. Raises
    KernelBuildFailed, also where there is no compiler.
    """
    isas = isas or (VECTOR_ISAS if platform.machine() in _X86 else (PORTABLE,))
    kernels = kernel_sources(specs, isas)
    sources = [(kernel.text, kernel.isa.flags) for kernel in kernels]
    sources.append((operators_source(kernels, isas), ()))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a compiler
        objects = list(pool.map(lambda source: build_object("ort", *source), sources))
    _link(objects, path)
    return len(kernels)


def _link(objects: Sequence[Path], path: Path) -> None:
    found = compiler()
    assert found is not None  # it made the objects
    with tempfile.TemporaryDirectory(prefix="sparsefx") as folder:
        exports = Path(folder, "exports")
        exports.write_text(_EXPORTS)
        script = f"-Wl,--version-script={exports}"
        line = (found.path, *map(str, objects), *_LINK, script, "-o", str(path))
        done = subprocess.run(line, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            raise KernelBuildFailed(kernel=path.name, rule=done.stderr.strip()[:2000])
