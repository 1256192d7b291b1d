"""SPARSEFX_DUMP=passes: a graph as a Python file that runs by itself."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx
from torch.fx.graph_module import _format_import_block
from torch.package.importer import sys_importer

from sparsefx.attributes import get_tensor, set_tensor
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


class Graph(torch.nn.Module):
{code}

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
    code = gm.graph.python_code("self")
    text = _FILE.format(
        title=f"Graph {graph} after {name}, stage {stage}.",
        file=path.name,
        weights_note="in the .safetensors file beside it" if small else "random, too large to dump",
        imports=_format_import_block(code.globals, sys_importer).strip(),
        attributes=_table({k: _describe(t) for k, t in tensors.items()}),
        inputs=_table({n.name: _input(n) for n in gm.graph.find_nodes(op="placeholder")}),
        code="\n".join(f"    {line}" if line else "" for line in code.src.strip().split("\n")),
    )
    write_atomically(path, text.encode())
    if small:
        copies = {k: t.detach().clone().contiguous() for k, t in tensors.items()}
        with replacing(path.with_suffix(".safetensors")) as temporary:
            save_file(copies, temporary)
    return path


def load(
    module: torch.nn.Module, attributes: dict[str, tuple[tuple[int, ...], str]], file: str
) -> torch.nn.Module:
    """Fills a dumped module with the tensors beside its file, or random ones."""
    stored = Path(file).with_suffix(".safetensors")
    tensors = load_file(stored) if stored.exists() else {}
    for name, (shape, dtype) in attributes.items():
        set_tensor(module, name, tensors.get(name, _random(shape, dtype)))
    return module


def sample(inputs: dict[str, tuple[tuple[int, ...], str] | int]) -> list[Tensor | int]:
    """Example inputs of the dumped shapes; whole numbers are 0, which every vocabulary has."""
    return [value if isinstance(value, int) else _random(*value) for value in inputs.values()]


def _random(shape: tuple[int, ...], dtype: str) -> Tensor:
    kind = getattr(torch, dtype)
    if kind.is_floating_point:
        return torch.randn(shape).to(kind)
    return torch.zeros(shape, dtype=kind)


def _tensors(gm: fx.GraphModule) -> dict[str, Tensor]:
    names = dict.fromkeys(str(node.target) for node in gm.graph.find_nodes(op="get_attr"))
    return {name: get_tensor(gm, name) for name in names}


def _describe(tensor: Tensor) -> tuple[tuple[int, ...], str]:
    return tuple(hint(size) for size in tensor.shape), str(tensor.dtype).removeprefix("torch.")


def _input(node: fx.Node) -> tuple[tuple[int, ...], str] | int:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return _describe(value)
    return hint(value) if isinstance(value, int | torch.SymInt) else 0


def _table(rows: dict[str, object]) -> str:
    lines = "".join(f"    {name!r}: {value!r},\n" for name, value in rows.items())
    return "{\n" + lines + "}"
