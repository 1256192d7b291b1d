"""Never slower: which packed nodes of a file the library would not make faster, measured.

The nodes of a session with the library tell the shapes of their inputs. For each distinct kind of
node a small file of copies of it, each with weights of its own, runs in turns without and with the
library. What does not win is moved to the domain "sparsefx.dense", which no library takes: its
model-local function is then what every session runs.
"""

import json
import tempfile
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from onnx_ir.passes.common import RemoveUnusedFunctionsPass

from sparsefx import timing
from sparsefx.codegen.onnx.check import Probe, session
from sparsefx.codegen.onnx.functions import DENSE_DOMAIN, DOMAIN, VERSION
from sparsefx.codegen.onnx.lower import parameter
from sparsefx.codegen.onnx.ort.alone import Shapes, alone, copies_of, inputs_of
from sparsefx.codegen.onnx.ort.wanted import LAYOUTS, dense_shape
from sparsefx.guard import Verdict

_EVENT = "_kernel_time"  # how the names of a profile's events end


def losers(model: ir.Model, file: Path, library: Path, probe: Probe) -> dict[str, str]:
    """Name of each packed node that does not win at the probe's shapes -> that of its weight.

    file: `model` as written.
    """
    shapes = _shapes(file, library, probe)
    kinds: dict[object, list[ir.Node]] = defaultdict(list)
    for node in _packed(model):
        if node.name in shapes:
            kinds[_kind(node, shapes[node.name])].append(node)
    found = {}
    for nodes in kinds.values():
        verdict = _verdict(model, nodes[0], shapes[str(nodes[0].name)], library)
        if not verdict.wins:
            found.update({str(node.name): _weight(node) for node in nodes})
    return found


def demote(model: ir.Model, names: Collection[str]) -> None:
    """Moves the packed nodes of these names to DENSE_DOMAIN, in place."""
    for node in _packed(model):
        if node.name in names:
            body = _elsewhere(model.functions[node.op_identifier()])
            model.functions.setdefault(body.identifier(), body)
            model.opset_imports.setdefault(DENSE_DOMAIN, VERSION)
            node.domain = DENSE_DOMAIN
    RemoveUnusedFunctionsPass()(model)


def taken(model: ir.Model) -> frozenset[str]:
    """The weights of the packed nodes that a library takes."""
    return frozenset(_weight(node) for node in _packed(model))


def _packed(model: ir.Model) -> list[ir.Node]:
    nodes = model.graph.all_nodes()
    return [node for node in nodes if node.domain == DOMAIN and node.op_type in LAYOUTS]


def _weight(node: ir.Node) -> str:
    values = node.inputs[1]
    assert values is not None
    return parameter(values)


def _elsewhere(body: ir.Function) -> ir.Function:
    proto = ir.serde.serialize_function(body)
    proto.domain = DENSE_DOMAIN
    return ir.serde.deserialize_function(proto)


def _shapes(file: Path, library: Path, probe: Probe) -> dict[str, Shapes]:
    """Name of each node that ran -> the shapes of its inputs, as onnxruntime's profile has them."""
    with tempfile.TemporaryDirectory(prefix="sparsefx") as folder:
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        run = session(file, library, options)
        taken = {value.name for value in run.get_inputs()}
        run.run(None, {name: array for name, array in probe.feed.items() if name in taken})
        events = json.loads(Path(run.end_profiling()).read_text())
    return {
        event["name"].removesuffix(_EVENT): _input_shapes(event["args"]["input_type_shape"])
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith(_EVENT)
    }


def _input_shapes(inputs: Sequence[Mapping[str, Sequence[int]]]) -> Shapes:
    return tuple(tuple(shape) for each in inputs for shape in each.values())


def _kind(node: ir.Node, shapes: Shapes) -> object:
    """Equal for nodes that take equal times; the numbers of values of bitmaps are rounded."""
    out, width = dense_shape(node)
    values = node.inputs[1]
    assert values is not None
    assert values.const_value is not None
    density = round(values.const_value.size / max(1, out * width), 2)
    return node.op_identifier(), out, width, density, shapes[0], shapes[3:]


def _verdict(model: ir.Model, node: ir.Node, shapes: Shapes, library: Path) -> Verdict:
    copies = copies_of(node)
    feed = dict(inputs_of(node, shapes))
    with tempfile.TemporaryDirectory(prefix="sparsefx") as folder:
        path = Path(folder) / "node.onnx"
        ir.save(alone(model, node, copies, feed), path)
        both = [session(path, each, _calm()) for each in (None, library)]
    runs = [partial(_run, each, feed) for each in both]
    took = timing.paired_over(runs[0], runs[1], range, torch.device("cpu"))
    first, second = took.first_us / copies, took.second_us / copies
    return Verdict(first, second, "measured", bound=took.bound)


def _run(run: onnxruntime.InferenceSession, feed: Mapping[str, np.ndarray], _: int) -> torch.Tensor:
    return torch.from_numpy(run.run(None, feed)[0])


def _calm() -> onnxruntime.SessionOptions:
    """Threads do not spin when a run ends: they would take a core from the session that is next."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options
