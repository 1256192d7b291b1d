"""DINOv2 ViT-S/14 with a saliency head in plain PyTorch, its weights read from an ONNX file.

The backbone follows Oquab et al. 2023 (arXiv 2304.07193); parameter names are those of the file.
"""

import re
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HEADS, LAYERS, PATCH, GRID = 384, 6, 12, 14, 16


class Attention(nn.Module):
    """Multi-head self-attention over [batch, tokens, 384], no mask."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.output = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, 384] -> the same shape."""
        q, k, v = (
            part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v)
        joined: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return joined


class MLP(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.fc2 = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[..., 384] -> [..., 384]."""
        y: Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return y


class Layer(nn.Module):
    """One pre-norm transformer layer with LayerScale on both branches."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, eps=1e-6)
        self.attention = Attention()
        self.layer_scale1 = nn.Parameter(torch.ones(WIDTH))
        self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6)
        self.mlp = MLP()
        self.layer_scale2 = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, 384] -> the same shape."""
        x = x + self.layer_scale1 * self.attention(self.norm1(x))
        y: Tensor = x + self.layer_scale2 * self.mlp(self.norm2(x))
        return y


class SaliencyHead(nn.Module):
    """Three transposed convolutions from the patch grid to 8 times its sides, then one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.upconv1 = nn.ConvTranspose2d(WIDTH, 256, 4, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(256)
        self.upconv2 = nn.ConvTranspose2d(256, 128, 4, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(128)
        self.upconv3 = nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1)
        self.bn3 = nn.BatchNorm2d(64)
        self.final_conv = nn.Conv2d(64, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 384, grid, grid] -> logits [batch, 1, 8 grid, 8 grid]."""
        x = functional.relu(self.bn1(self.upconv1(x)))
        x = functional.relu(self.bn2(self.upconv2(x)))
        x = functional.relu(self.bn3(self.upconv3(x)))
        logits: Tensor = self.final_conv(x)
        return logits


class DinoV2Saliency(nn.Module):
    """DINOv2-S/14 and a saliency head, for images of grid x grid patches of 14 x 14 pixels."""

    def __init__(self, grid: int = GRID) -> None:
        super().__init__()
        self.grid = grid
        self.projection = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.zeros(1, 1 + grid * grid, WIDTH))
        self.layer = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.layernorm = nn.LayerNorm(WIDTH, eps=1e-6)
        self.decoder = SaliencyHead()

    def forward(self, image: Tensor) -> Tensor:
        """[batch, 3, 14 grid, 14 grid], ImageNet-normalised -> saliency in (0, 1), one channel."""
        patches = self.projection(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(image.shape[0], -1, -1), patches], 1) + self.positions
        for layer in self.layer:
            x = layer(x)
        features = self.layernorm(x)[:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid))
        logits = functional.interpolate(
            self.decoder(features), size=image.shape[-2:], mode="bilinear"
        )
        return logits.sigmoid()


def load(path: Path, grid: int = GRID) -> DinoV2Saliency:
    """The network with the weights of an ONNX file; raises if one is missing or left over."""
    graph = onnx.load(path).graph
    stored = {item.name: item for item in graph.initializer}
    state = {_renamed(name): _tensor(stored[name]) for name in stored if "::" not in name}
    for node in graph.node:
        # Linear weights are anonymous and transposed; the node's path tells whose they are.
        if node.op_type == "MatMul" and node.input[1] in stored:
            name = node.name.strip("/").removesuffix("/MatMul").replace("/", ".") + ".weight"
            state[_renamed(name)] = _tensor(stored[node.input[1]]).T.contiguous()
    state["positions"] = _positions(
        *(_tensor(stored[name]) for name in _position_names(graph)), grid
    )
    model = DinoV2Saliency(grid)
    batches = {name for name in model.state_dict() if name.endswith("num_batches_tracked")}
    model.load_state_dict(state | {name: torch.tensor(0) for name in batches})
    return model.eval()


def _renamed(name: str) -> str:
    """`backbone.encoder.layer.0.attention.output.dense.bias` -> `layer.0.attention.output.bias`."""
    name = re.sub(r"^backbone\.(encoder\.|embeddings\.(patch_embeddings\.)?)?", "", name)
    name = name.replace("attention.attention.", "attention.").replace("output.dense.", "output.")
    return name.removesuffix(".lambda1")


def _tensor(item: onnx.TensorProto) -> Tensor:
    return torch.from_numpy(numpy_helper.to_array(item).copy())


def _position_names(graph: onnx.GraphProto) -> tuple[str, str]:
    """The initializers of the class token's position and of the 37 x 37 patch positions."""
    nodes = {node.name: node for node in graph.node}
    embeddings = "/backbone/embeddings/"
    return nodes[embeddings + "Concat_6"].input[0], nodes[embeddings + "Reshape_1"].input[0]


def _positions(first: Tensor, table: Tensor, grid: int) -> Tensor:
    """The class token's position and the trained table, resized: [1, 1 + grid * grid, 384]."""
    side = int(table.shape[1] ** 0.5)
    square = table.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    resized = functional.interpolate(square, size=(grid, grid), mode="bicubic")
    return torch.cat([first, resized.flatten(2).transpose(1, 2)], 1)
