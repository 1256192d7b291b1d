"""LinearSpecs -> the C++ sources of one library: a source a kernel, and one with the operators.

A kernel is what codegen/cpp generates, word for word, with onnxruntime's threads in the place of
OpenMP's. It stands in a namespace without a name, because a library holds several, and is known to
the operators by a table entry.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsefx.codegen.cpp import emit as cpp
from sparsefx.codegen.cpp.isa import Isa
from sparsefx.codegen.onnx.ort.wanted import ELEMENT_TYPES
from sparsefx.target import LinearSpec

_TEMPLATES = Path(__file__).parent / "templates"
_BEGIN, _END = "// begin specialisation\n", "// end specialisation\n"
_OPERATORS = {"nm": "NMLinear", "bitmap": "BitmapLinear"}
_INCLUDE = re.compile(r"^#include <.+>\n", re.MULTILINE)


@dataclass(frozen=True)
class KernelSource:
    """A kernel as a source of its own; `name` is that of its table entry."""

    name: str
    isa: Isa
    text: str


def kernel_sources(specs: Iterable[LinearSpec], isas: Sequence[Isa]) -> tuple[KernelSource, ...]:
    """The sources for `specs` on each of `isas`, in their order; equal kernels once."""
    found: dict[str, tuple[Isa, LinearSpec]] = {}
    for isa in isas:
        for spec in specs:
            text = cpp.source(spec, isa, _TEMPLATES / "threads.h")
            found.setdefault(text, (isa, spec))
    return tuple(_kernel(text, spec, isa) for text, (isa, spec) in found.items())


def operators_source(kernels: Sequence[KernelSource], isas: Sequence[Isa]) -> str:
    """The source of the operators, which choose among `kernels` on the machine they run on."""
    before, _, rest = (_TEMPLATES / "operators.cpp").read_text().partition(_BEGIN)
    text = before + _table(kernels, isas) + rest.partition(_END)[2]
    return re.sub(r'^#include "(.+)"$', lambda m: cpp.inlined(_TEMPLATES / m[1]), text, flags=re.M)


def _kernel(text: str, spec: LinearSpec, isa: Isa) -> KernelSource:
    """Named by content, so that the same kernel of another model need not be compiled again."""
    name = f"kernel_{hashlib.sha256(f'{text}{spec.density!r}'.encode()).hexdigest()[:16]}"
    return KernelSource(name, isa, _enclosed(name, text, spec, isa))


def _enclosed(name: str, text: str, spec: LinearSpec, isa: Isa) -> str:
    """A kernel's source in a namespace, its includes outside, and its table entry behind it."""
    includes = dict.fromkeys(_INCLUDE.findall(text))
    body = _INCLUDE.sub("", text).replace('extern "C" ', "static ")
    return f"""{"".join(includes)}
{(_TEMPLATES / "kernel.h").read_text()}
namespace {{
{body}
{(_TEMPLATES / "entry.h").read_text()}
}}  // namespace

namespace sparsefx {{
extern const Kernel {name} = {{
    "{_OPERATORS[spec.layout]}", "{spec.epilogue}", "{isa.name}",
    {ELEMENT_TYPES[spec.dtype]}, {spec.n}, {spec.m}, BIAS, EXTRAS, INDEX_BITS,
    {spec.density!r}, run}};
}}
"""


def _table(kernels: Sequence[KernelSource], isas: Sequence[Isa]) -> str:
    names = [f"extern const Kernel {kernel.name};" for kernel in kernels]
    present = [f"static bool has_{isa.name}() {{ return {_condition(isa)}; }}" for isa in isas]
    choices = [f"    {{has_{kernel.isa.name}, &sparsefx::{kernel.name}}}," for kernel in kernels]
    lines = ["namespace sparsefx {", *names, "}", *present]
    return "\n".join([*lines, "static const std::vector<Choice> CHOICES = {", *choices, "};\n"])


def _condition(isa: Isa) -> str:
    """Whether the processor has what `isa` needs, as g++ spells it (no underscores)."""
    flags = sorted(flag.replace("_", "") for flag in isa.needs)
    return " && ".join(f'__builtin_cpu_supports("{flag}")' for flag in flags) or "true"
