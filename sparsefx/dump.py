"""SPARSEFX_DUMP: graphs as Python files that run by themselves, and the text of kernels."""

import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx
from torch.fx.graph import CodeGen, PythonCode
from torch.fx.graph_module import _format_import_block
from torch.package.importer import sys_importer

from sparsefx import debug
from sparsefx.attributes import get_tensor, is_graph, set_tensor
from sparsefx.files import replacing, write_atomically
from sparsefx.shapes import hint

WEIGHTS_LIMIT = 64 * 2**20
"""Bytes up to which a stage's tensors are written beside it; larger ones run on random weights."""

_FILE = '''"""{title}

Run it: python {file}. Weights: {weights_note}.
"""

{imports}
import sparsefx.codegen.cpp
import sparsefx.codegen.triton
import sparsefx.ops
from sparsefx.dump import load, sample

ATTRIBUTES = {attributes}
INPUTS = {inputs}


{classes}


if __name__ == "__main__":
    graph = load(Graph(), ATTRIBUTES, __file__)
    with torch.no_grad():
        print(graph(*sample(INPUTS)))
'''


def write(gm: fx.GraphModule, folder: Path, graph: int, number: int, name: str, stage: str) -> Path:
    """Writes `folder`/graph<k>/<number>_<name>.py and, if small, its tensors. Returns its path."""
    path = folder / f"graph{graph}" / f"{number:02d}_{name}.py"
    tensors = _tensors(gm)
    small = sum(t.numel() * t.element_size() for t in tensors.values()) <= WEIGHTS_LIMIT
    bodies = _bodies(gm)
    codes = {key: python_code(body) for key, body in {**bodies, "": gm}.items()}
    text = _FILE.format(
        title=f"Graph {graph} after {name}, stage {stage}.",
        file=path.name,
        weights_note="in the .safetensors file beside it" if small else "random, too large to dump",
        imports=_format_import_block(
            {key: value for code in codes.values() for key, value in code.globals.items()},
            sys_importer,
        ).strip(),
        attributes=_table({k: _describe(t) for k, t in tensors.items()}),
        inputs=_table({n.name: _input(n) for n in gm.graph.find_nodes(op="placeholder")}),
        classes="\n\n\n".join(_class(key, code.src, bodies) for key, code in codes.items()),
    )
    write_atomically(path, text.encode())
    if small:
        copies = {k: t.detach().clone().contiguous() for k, t in tensors.items()}
        with replacing(path.with_suffix(".safetensors")) as temporary:
            save_file(copies, temporary)
    return path


def kernel(path: Path, text: str) -> None:
    """With SPARSEFX_DUMP=kernels, writes a chosen kernel's source into `<dump folder>/kernels`."""
    settings = debug.settings()
    if "kernels" in settings.dump:
        write_atomically(settings.dump_folder / "kernels" / path.name, text.encode())


def python_code(gm: fx.GraphModule) -> PythonCode:
    """The graph as the text of a `forward` that takes and returns tensors, and what it imports.

    torch.export's own text packs and unpacks nested arguments by specifications that lie outside.
    """
    codegen = gm.graph._codegen
    gm.graph.set_codegen(CodeGen())
    try:
        return gm.graph.python_code("self")
    finally:
        gm.graph.set_codegen(codegen)


def load(
    module: torch.nn.Module, attributes: dict[str, tuple[tuple[int, ...], str]], file: str
) -> torch.nn.Module:
    """Fills a dumped module with the tensors beside its file, or random ones."""
    stored = Path(file).with_suffix(".safetensors")
    tensors = load_file(stored) if stored.exists() else {}
    for name, (shape, dtype) in attributes.items():
        value = tensors[name] if name in tensors else _random(shape, dtype, _generator(name))
        set_tensor(module, name, value)
    return module


def sample(inputs: dict[str, tuple[tuple[int, ...], str] | int]) -> list[Tensor | int]:
    """Example inputs of the dumped shapes, the same at every stage of a graph.

    Whole numbers are 0, which every vocabulary has.
    """
    return [
        value if isinstance(value, int) else _random(*value, _generator(name))
        for name, value in inputs.items()
    ]


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def _random(shape: tuple[int, ...], dtype: str, generator: torch.Generator) -> Tensor:
    kind = getattr(torch, dtype)
    if kind.is_floating_point and not shape:
        return torch.rand(shape, generator=generator).to(kind)  # an epsilon, a scale: positive
    if kind.is_floating_point:
        return torch.randn(shape, generator=generator).to(kind)
    return torch.zeros(shape, dtype=kind)


def _tensors(gm: fx.GraphModule) -> dict[str, Tensor]:
    graphs = {f"{key}.": body for key, body in _bodies(gm).items()}
    return {
        f"{prefix}{name}": get_tensor(graph, name)
        for prefix, graph in {**graphs, "": gm}.items()
        for name in _attributes(graph)
        if not is_graph(graph, name)
    }


def _attributes(gm: fx.GraphModule) -> list[str]:
    return list(dict.fromkeys(str(node.target) for node in gm.graph.find_nodes(op="get_attr")))


def _bodies(gm: fx.GraphModule, prefix: str = "") -> dict[str, fx.GraphModule]:
    """Dotted name -> graph of each branch or checkpointed body, the innermost first."""
    found: dict[str, fx.GraphModule] = {}
    for name in _attributes(gm):
        body = gm.get_submodule(name) if is_graph(gm, name) else None
        if isinstance(body, fx.GraphModule):
            found.update(_bodies(body, f"{prefix}{name}."))
            found[f"{prefix}{name}"] = body
    return found


def _class(name: str, source: str, bodies: dict[str, fx.GraphModule]) -> str:
    """A graph as a class; it makes those of its own branches."""
    inner = [each for each in bodies if each.rpartition(".")[0] == name]
    made = [f"self.{each.rpartition('.')[2]} = {_class_name(each)}()" for each in inner]
    setup = ["def __init__(self):", *(f"    {line}" for line in ("super().__init__()", *made)), ""]
    lines = (setup if made else []) + source.strip().split("\n")
    text = "\n".join(f"    {line}" if line else "" for line in lines)
    return f"class {_class_name(name)}(torch.nn.Module):\n{text}"


def _class_name(name: str) -> str:
    return "Graph" + "".join(part.title().replace("_", "") for part in name.split(".") if part)


def _describe(tensor: Tensor) -> tuple[tuple[int, ...], str]:
    return tuple(hint(size) for size in tensor.shape), str(tensor.dtype).removeprefix("torch.")


def _input(node: fx.Node) -> tuple[tuple[int, ...], str] | int:
    if not node.users:
        return 0  # a weight that became an attribute: not worth its memory
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return _describe(value)
    return hint(value) if isinstance(value, int | torch.SymInt) else 0


def _table(rows: dict[str, object]) -> str:
    lines = "".join(f"    {name!r}: {value!r},\n" for name, value in rows.items())
    return "{\n" + lines + "}"
