"""Small modules whose channels are laid out in every way that couplings are tested on."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Convolutions(nn.Module):
    """conv-bn-relu-depthwise-bn-hardswish-conv, squeeze and excitation, pooling, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.norm2 = nn.BatchNorm2d(16)
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.project, self.head = nn.Conv2d(16, 24, 3, stride=2), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.stem(x)), inplace=True)
        x = F.hardswish(self.norm2(self.depthwise(F.pad(x, (0, 1, 0, 1)))))
        gate = self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))).sigmoid()
        x = F.relu6(self.project(x * gate))
        y: Tensor = self.head(F.dropout(x, 0.5, self.training).mean((2, 3)))
        return y


class FusedAttention(nn.Module):
    """q, k and v of one linear, taken apart by unbind; q, as under rope, cannot move, v can."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).reshape(*x.shape[:2], 3, 4, 4).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        mixed = (q.cumsum(-1) @ k.transpose(-2, -1)).softmax(-1) @ v * self.scale
        y: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return y


class FusedGate(nn.Module):
    """Gate and up of one linear, in halves; a norm and a scale of each channel behind."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.norm = nn.Linear(8, 32), nn.LayerNorm(16)
        self.scale, self.down = nn.Parameter(torch.ones(16)), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1)
        y: Tensor = self.down(self.norm(F.gelu(gate) * up) * self.scale)
        return y


class Crossed(nn.Module):
    """Two factors whose halves lie crosswise in one linear: [a low, b low, b high, a high]."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(8, 32), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        a_low, b_low, b_high, a_high = self.both(x).split(8, -1)
        a, b = torch.cat([a_low, a_high], -1), torch.cat([b_low, b_high], -1)
        y: Tensor = self.down(a * b.sigmoid())
        return y


class Joined(nn.Module):
    """Two linears side by side before a third, one half of which also goes elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 16)
        self.joined = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        right = self.right(x)
        return self.joined(torch.cat([self.left(x), right], -1).tanh()), right[..., :8]


class Siblings(nn.Module):
    """Two readers of one hidden tensor, one of which is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.one(self.first(x).relu()) + self.two(self.first(x + 1).relu())
        return y


class Refused(nn.Module):
    """One linear behind another, with something in between that an order would not survive."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("table", torch.rand(5, 8))
        self.grouped = nn.Conv1d(8, 8, 1, groups=2)
        self.unused = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        hidden = self.first(x).relu()
        match self.kind:
            case "cumulative":
                hidden = hidden.cumsum(-1)
            case "flipped":
                hidden = hidden.flip(-1)
            case "by what was sorted":
                hidden = hidden * self.table.sort(-1).values
            case "by a table":
                hidden = hidden * self.table
            case "by a constant":
                hidden = hidden * torch.arange(8.0, dtype=x.dtype)
            case "read by the user":
                return self.second(hidden), hidden
            case "residual":
                hidden = hidden + self.second(hidden)
            case "fed back":
                hidden = self.first(hidden)
            case "grouped":
                hidden = self.grouped(hidden.mT).mT
        result: Tensor = self.second(hidden)
        return result
