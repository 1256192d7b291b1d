"""Capture by either door into one normal form, and back out to Inductor.

Normal form: a GraphModule in which the operators that passes look at are aten overloads
(normalise.py), weights are `get_attr` nodes under their real names, and tensor nodes carry
`meta["val"]`.

*Export door*: `capture(model, args)`; used by export_onnx and calibration.
*Dynamo door*: `bind(gm, example_inputs)` inside a torch.compile backend, where weights come as
placeholders; `unbind` turns those that are still used back before Inductor sees the graph.
"""

import copy
import itertools
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, fx, nn

from sparsefx.attributes import get_tensor, is_graph, remove_unused, set_tensor
from sparsefx.normalise import normalise

T = TypeVar("T")
# As torch.export declares it. Any: what lies inside nests as the arguments do.
DynamicShapes = dict[str, Any] | tuple[Any, ...] | list[Any] | None


def capture(
    model: nn.Module,
    args: tuple[object, ...],
    kwargs: Mapping[str, object] | None = None,
    dynamic_shapes: DynamicShapes = None,
) -> fx.GraphModule:
    """The graph of `model(*args, **kwargs)` through torch.export, in normal form.

    `dynamic_shapes` as torch.export takes them. Example tensors are cloned, because two arguments
    that are one tensor object give a silently wrong graph. The weights are the model's own.
    """
    args, kwargs = clone_inputs((tuple(args), dict(kwargs or {})))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export warns about its own internals
        program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    for node in module.graph.find_nodes(op="get_attr"):
        if not is_graph(module, str(node.target)):
            node.meta["val"] = get_tensor(module, str(node.target))  # the real one, not a fake
    return normalise(module)


def clone_inputs(inputs: T) -> T:
    """A copy of a tree of arguments in which no two tensors are one object."""
    copies: T = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), inputs)
    return copies


@dataclass(frozen=True)
class Bound:
    """A Dynamo graph in normal form. `placeholders`: weight name -> the input it came in as.

    The placeholders stay in the graph, unused, so that the order of inputs never changes.
    """

    gm: fx.GraphModule
    placeholders: dict[str, str]
    weights: dict[str, Tensor]


def bind(gm: fx.GraphModule, example_inputs: Sequence[object]) -> Bound:
    """Puts the real weights of a Dynamo graph on a copy of it, under their real names."""
    graph_copy = _copy(gm)
    inputs = graph_copy.graph.find_nodes(op="placeholder")
    placeholders: dict[str, str] = {}
    weights: dict[str, Tensor] = {}
    names = _Names(set(dir(graph_copy)))
    for node, value in zip(inputs, example_inputs, strict=True):
        parameter = weight_name(node)
        if parameter is None or not _is_readable(value):
            continue
        name = names.take(parameter)
        set_tensor(graph_copy, name, value)
        with graph_copy.graph.inserting_after(inputs[-1]):
            attribute = graph_copy.graph.get_attr(name)
        attribute.meta.update(val=value, sparsefx_parameter=parameter)
        attribute.meta["example_value"] = node.meta.get("example_value")
        node.replace_all_uses_with(attribute)
        placeholders[name], weights[name] = node.name, value
    return Bound(normalise(graph_copy), placeholders, weights)


def unbind(bound: Bound) -> fx.GraphModule:
    """Gives weights that are still used back to their placeholders, so Inductor sees inputs.

    What passes added (packed tensors, masks) stays as buffers; AOTAutograd wants a Dynamo source
    for each.
    """
    gm = bound.gm
    inputs = {node.name: node for node in gm.graph.find_nodes(op="placeholder")}
    for node in gm.graph.find_nodes(op="get_attr"):
        if node.target in bound.placeholders:
            node.replace_all_uses_with(inputs[bound.placeholders[str(node.target)]])
            gm.graph.erase_node(node)
    _flatten(gm)
    gm.graph.lint()
    gm.recompile()
    return gm


class _Names:
    """Gives each weight a name that nothing else on the graph module has.

    Two models called in one function have weights of one name; and a graph module has attributes of
    its own, such as `graph` and `code`.
    """

    def __init__(self, reserved: set[str]) -> None:
        self._reserved = reserved
        self._taken: set[str] = set()
        self._owners: set[str] = set()

    def take(self, wanted: str) -> str:
        """`wanted`, or the same behind a number."""
        numbered = (f"_{number}_{wanted}" for number in itertools.count(2))
        name = next(name for name in itertools.chain((wanted,), numbered) if self._is_free(name))
        self._taken.add(name)
        self._owners.update(_owners(name))
        return name

    def _is_free(self, name: str) -> bool:
        owners = _owners(name)
        return not (
            (owners or [name])[0] in self._reserved
            or name in self._taken
            or name in self._owners
            or self._taken.intersection(owners)
        )


def _owners(name: str) -> list[str]:
    """ "a.b.c" -> ["a", "a.b"]."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _is_readable(value: object) -> TypeGuard[Tensor]:
    """Whether the numbers of a weight can be looked at: not of a fake, a subclass, or on meta."""
    if not isinstance(value, Tensor) or type(value) not in (Tensor, nn.Parameter):
        return False
    return not value.is_meta and value.layout is torch.strided


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose nodes may be edited; Dynamo keeps using the original."""
    duplicate = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    duplicate.meta = dict(gm.meta)
    originals = gm.graph.find_nodes(op="placeholder")
    for original, node in zip(originals, duplicate.graph.find_nodes(op="placeholder"), strict=True):
        # A plain attribute that Dynamo sets and AOTAutograd reads; graph copies drop it.
        if "_dynamo_source" in original.__dict__:
            node._dynamo_source = original._dynamo_source
    sources = gm.__dict__.get("_param_name_to_source")
    if sources is not None:
        duplicate._param_name_to_source = dict(sources)  # type: ignore[assignment]  # no submodule
    return duplicate


def _flatten(gm: fx.GraphModule) -> None:
    """Renames dotted tensors that passes added to flat ones, each with a Dynamo source."""
    # Imported here: Dynamo is loaded by now, and `import sparsefx` must not load it.
    from torch._dynamo.source import ConstantSource

    sources = gm.__dict__.get("_param_name_to_source")
    names: dict[str, str] = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        dotted = str(node.target)
        if sources is None or dotted in sources or is_graph(gm, dotted):
            continue
        if dotted not in names:  # numbered, because a.b_c and a_b.c are two tensors
            flat = names[dotted] = f"_sparsefx_{len(names)}_{dotted.replace('.', '_')}"
            gm.register_buffer(flat, get_tensor(gm, dotted))
            sources[flat] = ConstantSource(source_name=flat)
        node.target = names[dotted]
    remove_unused(gm, {str(node.target) for node in gm.graph.find_nodes(op="get_attr")})


_STEP = re.compile(r"\._(modules|parameters|buffers)\['([^']+)'\]|\.([A-Za-z_]\w*)|\[(\d+)\]")


def weight_name(node: fx.Node) -> str | None:
    """ "model.layers.0.weight" from `L['self']._modules['model']...`, or None for other inputs."""
    source = node.__dict__.get("_dynamo_source")
    if source is None:
        return None
    text = source.name if isinstance(source.name, str) else source.name()
    if "._parameters[" not in text and "._buffers[" not in text:
        return None
    steps = [step[1] or step[2] or step[3] for step in _STEP.findall(text)]
    names = [step for step in steps if step != "_orig_mod"]
    return ".".join(names) if names else None
