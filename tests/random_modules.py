"""Random small modules for differential tests: every way that a weight can be used, from a seed."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsefx.spec import NM, Block, Pattern, Unstructured

WIDTH = 32
ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    F.relu,
    F.silu,
    F.gelu,
    lambda x: F.gelu(x, approximate="tanh"),
    lambda x: x,
)
PATTERNS: tuple[Pattern | None, ...] = (
    NM(2, 4),
    NM(1, 4),
    NM(4, 8),
    Unstructured(0.5),
    Unstructured(0.8),
    Block(16, 16, 0.5),
    None,
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Layer(nn.Module):
    """Base of the parts: `uses` counts how often its forward calls a linear with each weight."""

    uses: int = 1


class Plain(Layer):
    """A linear with a random activation behind it."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=rng.random() < 0.5)
        self.activation = rng.choice(ACTIVATIONS)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.linear(x))


class Residual(Layer):
    """x + scale * linear(x), on either side of the plus."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=rng.random() < 0.5)
        self.left = rng.random() < 0.5
        self.scale = rng.choice((0.5, 0.125, 2.0))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) * self.scale
        return x + y if self.left else y + x


class Gated(Layer):
    """down(silu(gate(x)) * up(x)), Shazeer 2020."""

    uses = 3

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=rng.random() < 0.3)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class Attention(Layer):
    """Self-attention by scaled_dot_product_attention, causal or not."""

    uses = 4

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.causal = rng.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (4, -1)).transpose(1, 2) for part in self.parts[:3])
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        y: Tensor = self.parts[3](mixed.transpose(1, 2).flatten(2))
        return y


class Reused(Layer):
    """One linear called twice, the second time on its own output."""

    uses = 2

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(F.relu(self.linear(x)))
        return y


class Tied(Layer):
    """Two linears that share one parameter."""

    uses = 2

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(x)))
        return y


class Transposed(Layer):
    """GPT-2's Conv1D: addmm with a weight stored [in, out]."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.bias = nn.Parameter(torch.randn(WIDTH) / 10)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, WIDTH), self.weight).view(x.shape)


class Convolution(Layer):
    """A convolution over the sequence: a candidate that no kernel takes."""

    uses = 0

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=rng.choice((1, 4)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return y


class Strided(Layer):
    """A linear on a non-contiguous view of its input."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x.flip(1).transpose(0, 1)).transpose(0, 1).relu()
        return y


class InPlace(Layer):
    """The linear's input changes between it and its activation: nothing may move past that."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        y = self.linear(x)
        x.add_(1.0)
        return F.relu(y) + x


PARTS = (
    Plain,
    Residual,
    Gated,
    Attention,
    Reused,
    Tied,
    Transposed,
    Convolution,
    Strided,
    InPlace,
)


@dataclass(frozen=True)
class Sample:
    """A module, an input for it, and how many linear calls read a weight with a pattern."""

    module: nn.Module
    x: Tensor
    sparse_calls: int
    linear_calls: int
    seed: int


def sample(seed: int) -> Sample:
    """The module of a seed: one to three parts, pruned weights, a dtype, an input."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    parts = [rng.choice(PARTS)(rng) for _ in range(rng.randint(1, 3))]
    dtype = rng.choice(DTYPES)
    sparse_calls = linear_calls = 0
    for part in parts:
        sparse_calls += _prune(part, rng)
        linear_calls += part.uses
    module = nn.Sequential(*parts).to(dtype).eval()
    x = torch.randn(rng.randint(1, 3), rng.randint(2, 9), WIDTH).to(dtype)
    if rng.random() < 0.3:
        x = torch.cat((x, x), -1)[..., ::2]
    return Sample(module, x, sparse_calls, linear_calls, seed)


@torch.no_grad()
def _prune(part: Layer, rng: random.Random) -> int:
    """Prunes each weight by a random pattern; returns the calls that read a pruned one."""
    matrices = [p for p in part.parameters() if p.dim() == 2]
    calls = 0
    for parameter in matrices:
        pattern = rng.choice(PATTERNS)
        stored = parameter.t() if isinstance(part, Transposed) else parameter
        if pattern is not None:
            keep = pattern.keep(stored.abs())
            stored.mul_(keep)
            calls += part.uses // len(matrices)
    return calls
