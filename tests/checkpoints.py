"""What the checkpoint tests share: a model of many kinds of tensor, and safetensors by hand."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsefx.checkpoint.layout import KEY
from sparsefx.prune.sparsify import sparsify
from sparsefx.spec import Pattern, Recipe

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
