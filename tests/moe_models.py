"""Mixtures of experts, the rows that each expert reads, and their run expert by expert."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation

WIDTH, INNER, EXPERTS = 16, 24, 4


class Experts(nn.Module):
    """A gated stack as models of transformers have it, run by transformers' grouped products."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        shapes = ((2 * INNER, WIDTH), (WIDTH, INNER))
        stored = [shape[::-1] if config.transposed else shape for shape in shapes]
        self.gate_up_proj, self.down_proj = (
            nn.Parameter(torch.randn(EXPERTS, *shape) / shape[0] ** 0.5) for shape in stored
        )
        self.act_fn = F.silu

    def forward(self, x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        raise NotImplementedError  # the decorator's takes its place


@use_experts_implementation
class PlainExperts(Experts):
    """[experts, out, in]."""


@use_experts_implementation(is_transposed=True)
class TransposedExperts(Experts):
    """[experts, in, out]."""


class MoE(nn.Module):
    """A linear router, of whose experts the last `closed` get no token, and a stack."""

    def __init__(self, *, transposed: bool = False, closed: int = 0) -> None:
        super().__init__()
        config = SimpleNamespace(transposed=transposed, _experts_implementation="grouped_mm")
        self.router = nn.Linear(WIDTH, EXPERTS)
        with torch.no_grad():
            self.router.bias[EXPERTS - closed :] -= 1000
        self.experts = (TransposedExperts if transposed else PlainExperts)(config)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)
        shares, chosen = self.router(tokens).softmax(-1).topk(2)
        found: Tensor = self.experts(tokens, chosen, shares).view_as(x) + x
        return found


def expert_rows(
    module: nn.Module, x: Tensor, chosen: Tensor, counted: Tensor | None = None
) -> dict[str, list[Tensor]]:
    """What each expert of a gated stack reads, float64 [n, in], by parameter name.

    x: [tokens, in]; chosen: the experts of each token, [tokens, k]; counted: bool [tokens].
    """
    stacks = {name: each.detach().double() for name, each in module.named_parameters()}
    if vars(module)["is_transposed"]:
        stacks = {name: each.transpose(1, 2) for name, each in stacks.items()}
    rows: dict[str, list[Tensor]] = {"gate_up_proj": [], "down_proj": []}
    for expert in range(len(stacks["down_proj"])):
        own = (chosen == expert).any(1)
        read = x[own if counted is None else own & counted].double()
        gate, up = (read @ stacks["gate_up_proj"][expert].T).chunk(2, -1)
        rows["gate_up_proj"].append(read)
        rows["down_proj"].append(F.silu(gate) * up)
    return rows


def seen_by(
    model: nn.Module, path: str, batches: list[dict[str, object]]
) -> dict[str, list[Tensor]]:
    """`expert_rows` of the stack at `path` over all batches, by hooks on a dense model."""
    found: dict[str, list[Tensor]] = {}

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        for name, rows in expert_rows(module, args[0], args[1]).items():
            before = found.get(name, [rows[0][:0]] * len(rows))
            found[name] = [torch.cat(pair) for pair in zip(before, rows, strict=True)]

    handle = model.get_submodule(path).register_forward_pre_hook(hook)
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return found


def one_by_one(
    module: nn.Module, took: Callable[[str, int, Tensor], None]
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A forward of a stack that is not transposed, each expert as two linears; took: gets the
    gradients at their outputs."""

    def forward(x: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        result = torch.zeros_like(x)
        for expert in range(vars(module)["num_experts"]):
            token, place = (chosen == expert).nonzero(as_tuple=True)
            both = x[token] @ module.get_parameter("gate_up_proj")[expert].T
            both.register_hook(lambda g, e=expert: took("gate_up_proj", e, g))
            gate, up = both.chunk(2, -1)
            out = (F.silu(gate) * up) @ module.get_parameter("down_proj")[expert].T
            out.register_hook(lambda g, e=expert: took("down_proj", e, g))
            result = result.index_add(0, token, out * shares[token, place, None])
        return result

    return forward
