"""Small float64 modules and what tests of passes do with them: capture, run, print, compare."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparsefx import ops as _dialect  # noqa: F401  # registers sparsefx::
from sparsefx.dump import python_code
from sparsefx.graph import capture
from sparsefx.passes.detect import Detect
from sparsefx.passes.fold_masks import FoldMasks
from sparsefx.passes.fuse_epilogue import FuseEpilogue
from sparsefx.passes.insert_masks import InsertMasks
from sparsefx.passes.pack_bitmap import PackBitmap
from sparsefx.passes.pack_block import PackBlock
from sparsefx.passes.pack_nm import PackNM
from sparsefx.pipeline import Pass, PassContext, run
from sparsefx.spec import NM, Pattern, Unstructured

WIDTH = 16
TWO_FOUR, HALF = NM(2, 4), Unstructured(0.75)

MASKED: tuple[Pass, ...] = (Detect(), InsertMasks())
PACKED: tuple[Pass, ...] = (*MASKED, PackNM(), PackBlock(), PackBitmap())
FUSED: tuple[Pass, ...] = (*PACKED, FoldMasks(), FuseEpilogue())


def sparse(
    pattern: Pattern | None, in_: int = WIDTH, out: int = WIDTH, bias: bool = True
) -> nn.Linear:
    """A float64 linear whose weight follows the pattern; None is dense."""
    linear = nn.Linear(in_, out, bias=bias, dtype=torch.float64)
    if pattern is not None:
        with torch.no_grad():
            linear.weight.mul_(pattern.keep(linear.weight.abs()))
    return linear


def transposed(pattern: NM | Unstructured) -> nn.Parameter:
    """A weight stored [in, out]."""
    return nn.Parameter(sparse(pattern).weight.detach().t().contiguous())


def bias(*shape: int) -> nn.Parameter:
    return nn.Parameter(x_of(*shape, seed=2))


class Around(nn.Module):
    """A module with parts whose forward is a function: `f(module, x)`."""

    def __init__(self, f: Callable[..., object], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.f = f
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Tensor) -> object:
        return self.f(self, *args)


class Net(nn.Module):
    """A 2:4 linear, an unstructured one without bias, a dense one; activation, scale, residual."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = sparse(TWO_FOUR, WIDTH, 2 * WIDTH)
        self.down = sparse(HALF, 2 * WIDTH, WIDTH, bias=False)
        self.head = sparse(None, WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(F.silu(self.up(x))) * 0.5)


def one(forward: Callable[..., object], **parts: nn.Module | Tensor) -> Around:
    """A module around one 2:4 linear called `l`."""
    torch.manual_seed(0)
    return Around(forward, **{"l": sparse(TWO_FOUR), **parts}).eval()


def x_of(*shape: int, seed: int = 1) -> Tensor:
    """A float64 input, [3, 16] if no shape is given."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (3, WIDTH), generator=generator, dtype=torch.float64)


def after(
    model: nn.Module, passes: Sequence[Pass], *args: Tensor
) -> tuple[fx.GraphModule, PassContext, dict[str, int]]:
    """The graph of the model behind the passes, its context and the counts."""
    gm, ctx = capture(model, args or (x_of(),)), PassContext()
    return gm, ctx, run(gm, passes, ctx)


@torch.no_grad()
def assert_same_numbers(gm: fx.GraphModule, model: nn.Module, *args: Tensor) -> None:
    """In float64, so that any difference but rounding shows."""
    args = args or (x_of(),)
    torch.testing.assert_close(gm(*args), model(*args), rtol=1e-12, atol=1e-12)


def text(gm: fx.GraphModule) -> str:
    """The graph as Python code, as SPARSEFX_DUMP=passes writes it."""
    return python_code(gm).src.strip() + "\n"


def calls(gm: fx.GraphModule) -> list[str]:
    """Names of the called operators, in order."""
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]
