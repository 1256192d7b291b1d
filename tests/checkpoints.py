"""What the checkpoint tests share: a model of many kinds of tensor, and safetensors by hand."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.api import sparsify
from sparsefx.attention.thresholds import SkipThresholds, ThetaThresholds
from sparsefx.checkpoint.layout import KEY
from sparsefx.spec import Pattern, Recipe

SKIP = SkipThresholds(
    prefill=(3.5, 0.0, 1e-3),
    decode=(0.25, 7.0, 12.0),
    tile=(64, 64),
    order="sink_diagonal",
    keys=(128, 2048),
    skipped=(0.7, None),
    error=(0.01, None),
    lost_mass=(0.004, None),
    r2=(0.98, None),
)
THETA = ThetaThresholds(
    k=64,
    lengths=(65, 128, 2048),
    theta=((-1.5, 0.0, 2.25), (1e-300, -1e300, 3.0)),
    lost=((0.5, 1.5, 2.5), (0.0, 0.0, 1.0)),
    placement="pre",
    denominator="offline",
    v_mean=True,
    keys=(64, 2048),
    kept=0.04,
    error=0.02,
)
Json = dict[str, Any]  # Any: the tests take it apart, and put nonsense in


class Zoo(nn.Module):
    """A linear, a convolution, a tied head, a scalar, an integer buffer and an empty one."""

    def __init__(self, out: int = 16, width: int = 32, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.conv = nn.Conv2d(16, 4, 3)
        self.embed = nn.Embedding(8, width)
        self.head = nn.Linear(width, 8, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.register_buffer("steps", torch.arange(5))
        self.register_buffer("empty", torch.empty(0, 4))
        self.to(dtype)


def zoo(
    pattern: Pattern | None = None,
    seed: int = 0,
    out: int = 16,
    width: int = 32,
    dtype: torch.dtype = torch.float32,
) -> Zoo:
    torch.manual_seed(seed)
    model = Zoo(out, width, dtype)
    if pattern is None:
        return model
    recipe = Recipe({"linear.weight": pattern, "conv.weight": pattern})
    return sparsify(model, recipe, inplace=True, progress=False)


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def snapshot(model: nn.Module) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    state = model.state_dict()
    return {name: (value.dtype, value.shape, raw(value)) for name, value in state.items()}


def layout_of(folder: Path) -> Json:
    header, _ = split(folder / "model.safetensors")
    layout: Json = json.loads(header["__metadata__"][KEY])
    return layout


def split(path: Path) -> tuple[Json, bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data
