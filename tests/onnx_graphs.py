"""Packed graphs for the ONNX tests, made by hand from captured ones: no pass is involved."""

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from sparsefx.attributes import get_tensor, remove_unused, set_tensor
from sparsefx.formats import pack_bitmap, pack_nm
from sparsefx.graph import capture
from sparsefx.spec import NM, Unstructured

aten = torch.ops.aten
Layout = tuple[int, int] | str | None  # (n, m), "bitmap", or None for dense


def pack(gm: fx.GraphModule, choose: Callable[[str, Tensor], Layout]) -> int:
    """Packs the linears of `gm` in place as `choose(parameter name, weight)` says; how many."""
    count = 0
    for node in list(gm.graph.nodes):
        if node.target is aten.linear.default:
            name, transposed, bias = str(node.args[1].target), False, (*node.args, None)[2]
            x, w = node.args[:2]
        elif node.target is aten.addmm.default:
            (bias, x, w), transposed = node.args, True
            name = str(w.target)
        else:
            continue
        weight = get_tensor(gm, name).detach()
        weight = weight.t().contiguous() if transposed else weight
        layout = choose(name, weight)
        if layout is not None:
            _replace(gm, node, (name, weight, layout), x, bias)
            count += 1
    gm.graph.eliminate_dead_code()
    remove_unused(gm, {str(node.target) for node in gm.graph.find_nodes(op="get_attr")})
    gm.recompile()
    return count


def fuse(
    gm: fx.GraphModule, linear: fx.Node, last: fx.Node, epilogue: str, extras: list[fx.Node]
) -> None:
    """Gives a packed linear the epilogue of the chain that ends in `last`, in place."""
    arguments = (*linear.args[:-2], epilogue, extras)
    with gm.graph.inserting_before(last):
        fused = gm.graph.call_function(linear.target, arguments)
    fused.meta = dict(last.meta)
    last.replace_all_uses_with(fused)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _replace(
    gm: fx.GraphModule,
    node: fx.Node,
    what: tuple[str, Tensor, tuple[int, int] | str],
    x: fx.Node,
    bias: fx.Node | None,
) -> None:
    name, weight, layout = what
    with gm.graph.inserting_before(node):
        if isinstance(layout, tuple):
            stored = _store(gm, name, pack_nm(weight, *layout)._asdict())
            arguments = (x, *stored, bias, *layout, "", [])
            new = gm.graph.call_function(torch.ops.sparsefx.nm_linear.default, arguments)
        else:
            stored = _store(gm, name, pack_bitmap(weight)._asdict())
            arguments = (x, *stored, bias, "", [])
            new = gm.graph.call_function(torch.ops.sparsefx.bitmap_linear.default, arguments)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)


def _store(gm: fx.GraphModule, name: str, parts: dict[str, Tensor]) -> list[fx.Node]:
    nodes = []
    for part, tensor in parts.items():
        set_tensor(gm, f"{name}_{part}", tensor)
        nodes.append(gm.graph.get_attr(f"{name}_{part}"))
        nodes[-1].meta["val"] = tensor
    return nodes


class MLP(nn.Module):
    """Three linears, a residual and a scale; the middle one has no bias."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.up = nn.Linear(32, width)
        self.middle = nn.Linear(width, width, bias=False)
        self.down = nn.Linear(width, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.up(x))
        return self.down(self.middle(h) + h) * 0.5


def sparse_mlp(dtype: torch.dtype = torch.float32, width: int = 64) -> MLP:
    """up is 2:4, middle 80 % unstructured, down dense."""
    torch.manual_seed(0)
    model = MLP(width).eval()
    with torch.no_grad():
        model.up.weight *= NM(2, 4).keep(model.up.weight.abs())
        model.middle.weight *= Unstructured(0.8).keep(model.middle.weight.abs())
    return model.to(dtype)


def layouts(name: str, weight: torch.Tensor) -> tuple[int, int] | str | None:
    return {"up.weight": (2, 4), "middle.weight": "bitmap"}.get(name)


def packed_mlp(model: MLP, x: torch.Tensor, dynamic: object = None) -> torch.fx.GraphModule:
    gm = capture(model, (x,), dynamic_shapes=dynamic)
    assert pack(gm, layouts) == 2
    return gm
