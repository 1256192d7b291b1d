"""A small residual model of two blocks, its inputs, and what pruning its layers by hand gives."""

import copy

import torch
from torch import Tensor, nn

import sparsefx
from tests.layer_inputs import correlated, squared_errors

WANDA = sparsefx.Unstructured(0.7, sparsefx.Wanda())


class Net(nn.Module):
    """Two blocks of two linears, and a head whose 10 inputs no 2:4 fits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(16, 32), "down": nn.Linear(32, 16)}) for _ in range(2)
        )
        self.narrow, self.head = nn.Linear(16, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            assert isinstance(block, nn.ModuleDict)
            x = x + block["down"](torch.nn.functional.silu(block["up"](x)))
        y: Tensor = self.head(self.narrow(x).relu())
        return y


X = correlated(96, 16)
NAMES = [f"blocks.{at}.{part}.weight" for at in (0, 1) for part in ("up", "down")]
NAMES += ["narrow.weight", "head.weight"]


class Distance:
    """1 + the relative distance of a model's outputs from those of a dense one; counts its calls.

    Fails at call number `fails`; what it saw of the model's mode is kept.
    """

    def __init__(self, model: nn.Module, fails: int = 0) -> None:
        with torch.no_grad():
            self.exact = copy.deepcopy(model).eval()(X)
        self.calls, self.fails, self.training = 0, fails, set[bool]()

    def __call__(self, model: nn.Module) -> float:
        self.calls += 1
        self.training.add(model.training or torch.is_grad_enabled())
        if self.calls == self.fails:
            raise KeyboardInterrupt
        return 1 + float((model(X) - self.exact).norm() / self.exact.norm())


def inputs(model: nn.Module, name: str) -> Tensor:
    """What a linear reads, float64."""
    seen: list[Tensor] = []
    module = model.get_submodule(name.removesuffix(".weight"))
    with module.register_forward_hook(lambda _, args, __: seen.append(args[0])), torch.no_grad():
        model(X)
    return seen[0].double()


def error_of(weight: Tensor, kept: Tensor, x: Tensor) -> float:
    lost, whole = squared_errors(x, weight, kept), squared_errors(x, weight, torch.zeros(1))
    return float((lost.sum() / whole.sum()).sqrt())


def by_wanda(weight: Tensor, x: Tensor, sparsity: float) -> Tensor:
    scores = weight.double().abs() * x.norm(dim=0)
    drop = scores.argsort(dim=1)[:, : int(sparsity * weight.shape[1])]
    return weight.scatter(1, drop, 0.0)
