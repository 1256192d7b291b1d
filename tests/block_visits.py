"""Visits of the sequential driver, and hooks on a copy of the model as its oracle."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from sparsefx.calibrate.sequential import Block, Visited
from sparsefx.calibrate.statistics import Gram
from sparsefx.prune.weights import prunable_weights
from tests.moe_models import expert_rows

GRAM = frozenset({"gram"})


def needs_of(model: nn.Module, kinds: frozenset[str] = GRAM) -> dict[str, frozenset[str]]:
    return {name: kinds for name, each in prunable_weights(model).items() if not each.held_back}


def wanda(block: Block) -> Visited:
    """Half of every row by |w| * norm of the input: depends on what the blocks before gave."""
    weights = {}
    for name, layer in block.layers.items():
        scores = []
        for matrix, statistics in layer.parts():
            gram = statistics["gram"]
            assert isinstance(gram, Gram)
            scores.append(matrix.abs() * gram.norms)
        rank = torch.cat(scores).argsort(dim=1, stable=True).argsort(dim=1)
        keep = layer.weight.as_stored(rank >= rank.shape[1] // 2)
        weights[name] = layer.weight.parameter.detach() * keep
    return Visited(weights, {"block": block.name, "layers": list(block.layers)})


class Recorder:
    """A visit that keeps a copy of every gram and then does as `then` says.

    grams, counts: of a layer of one part those of this part, else a list or stack over the parts.
    """

    def __init__(self, then: Callable[[Block], Visited] = wanda) -> None:
        self.grams: dict[str, Tensor] = {}
        self.counts: dict[str, list[int]] = {}
        self.blocks: list[list[str]] = []
        self._then = then

    def __call__(self, block: Block) -> Visited:
        self.blocks.append(list(block.layers))
        for name, layer in block.layers.items():
            grams = [part["gram"] for part in layer.statistics]
            found = [(each.gram, each.count) for each in grams if isinstance(each, Gram)]
            stacks = [torch.stack(each).squeeze(0) for each in zip(*found, strict=True)]
            self.grams[name], self.counts[name] = stacks[0], stacks[1].tolist()
        return self._then(block)


def nothing(block: Block) -> Visited:
    return Visited({}, {"number": block.number, "of": block.count})


def hooked(
    model: nn.Module, batches: list[dict[str, object]], layers: list[str], mask: Tensor | None
) -> dict[str, Tensor]:
    """X^T X of the layers' inputs, float64, of experts a stack, by hooks on the modules."""
    grams: dict[str, Tensor] = {}

    def watch(owner: str, kind: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if kind == "weight":
                rows = read_by(module, args[0], mask)
                found = rows.T @ rows
            else:
                counted = None if mask is None else mask.flatten()
                parts = expert_rows(module, args[0], args[1], counted)[kind]
                found = torch.stack([rows.T @ rows for rows in parts])
            name = f"{owner}.{kind}"
            grams[name] = grams.get(name, 0) + found

        return hook

    handles = []
    for name in layers:
        owner, _, kind = name.rpartition(".")
        handles.append(model.get_submodule(owner).register_forward_pre_hook(watch(owner, kind)))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return grams


def read_by(module: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows that a linear or an ungrouped convolution reads, float64 [n, in]."""
    if isinstance(module, nn.Conv2d):
        taps = module.kernel_size[0] * module.kernel_size[1]
        patches = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
        by_tap = patches.unflatten(1, (-1, taps)).transpose(1, 2).flatten(1, 2)
        return by_tap.transpose(1, 2).flatten(0, 1).double()
    rows = x.flatten(0, -2)
    rows = rows if mask is None or len(rows) != mask.numel() else rows[mask.flatten()]
    return rows.double()


def as_in(model: nn.Module, batch: dict[str, object]) -> dict[str, object]:
    dtype = next(model.parameters()).dtype
    return {
        key: each.to(dtype) if isinstance(each, Tensor) and each.is_floating_point() else each
        for key, each in batch.items()
    }


def assert_sequential(
    model: nn.Module,
    batches: list[dict[str, object]],
    seen: Recorder,
    weights: dict[str, Tensor],
    mask: Tensor | None = None,
) -> None:
    """What each block saw is what it gets behind the blocks before it, as they are now."""
    reference = copy.deepcopy(model).eval()
    if not isinstance(model, hf.MixtralForCausalLM):  # whose experts know no float64
        reference.double()
    parameters = dict(reference.named_parameters(remove_duplicate=False))
    for layers in seen.blocks:
        expected = hooked(reference, [as_in(reference, each) for each in batches], layers, mask)
        for name in layers:
            scale = expected[name].abs().max()
            torch.testing.assert_close(
                seen.grams[name].double() / scale, expected[name] / scale, rtol=0, atol=2e-5
            )
        with torch.no_grad():
            for name in layers:
                if name in weights:
                    parameters[name].copy_(weights[name])


def varied(batch: dict[str, object], count: int) -> list[dict[str, object]]:
    """Batches like `batch` with other tokens or pixels."""
    generator = torch.Generator().manual_seed(7)

    def another(key: str, each: object) -> object:
        if not isinstance(each, Tensor) or key == "attention_mask":
            return each
        if each.is_floating_point():
            return torch.randn(each.shape, generator=generator)
        return torch.randint(3, 96, each.shape, generator=generator)

    return [{key: another(key, each) for key, each in batch.items()} for _ in range(count)]
