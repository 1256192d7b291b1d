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

GRAM = frozenset({"gram"})


def needs_of(model: nn.Module, kinds: frozenset[str] = GRAM) -> dict[str, frozenset[str]]:
    return {name: kinds for name, each in prunable_weights(model).items() if not each.held_back}


def wanda(block: Block) -> Visited:
    """Half of every row by |w| * norm of the input: depends on what the blocks before gave."""
    weights = {}
    for name, layer in block.layers.items():
        gram = layer.statistics["gram"]
        assert isinstance(gram, Gram)
        matrix = layer.weight.matrix()
        rank = (matrix.abs() * gram.norms).argsort(dim=1, stable=True).argsort(dim=1)
        keep = layer.weight.as_stored(rank >= matrix.shape[1] // 2)
        weights[name] = layer.weight.parameter.detach() * keep
    return Visited(weights, {"block": block.name, "layers": list(block.layers)})


class Recorder:
    """A visit that keeps a copy of every gram and then does as `then` says."""

    def __init__(self, then: Callable[[Block], Visited] = wanda) -> None:
        self.grams: dict[str, Tensor] = {}
        self.counts: dict[str, list[int]] = {}
        self.blocks: list[list[str]] = []
        self._then = then

    def __call__(self, block: Block) -> Visited:
        self.blocks.append(list(block.layers))
        for name, layer in block.layers.items():
            gram = layer.statistics["gram"]
            assert isinstance(gram, Gram)
            self.grams[name] = gram.gram.clone()
            self.counts[name] = gram.count.tolist()
        return self._then(block)


def nothing(block: Block) -> Visited:
    return Visited({}, {"number": block.number, "of": block.count})


def hooked(
    model: nn.Module, batches: list[dict[str, object]], layers: list[str], mask: Tensor | None
) -> dict[str, Tensor]:
    """X^T X of the layers' inputs, float64, by hooks on the modules."""
    grams: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if isinstance(module, nn.Conv2d):
                taps = module.kernel_size[0] * module.kernel_size[1]
                patches = F.unfold(
                    x, module.kernel_size, module.dilation, module.padding, module.stride
                )
                by_tap = patches.unflatten(1, (-1, taps)).transpose(1, 2).flatten(1, 2)
                rows = by_tap.transpose(1, 2).flatten(0, 1)
            else:
                rows = x.flatten(0, -2)
                rows = rows if mask is None or len(rows) != mask.numel() else rows[mask.flatten()]
            rows = rows.double()
            grams[name] = grams.get(name, 0) + rows.T @ rows

        return hook

    handles = [
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(watch(name))
        for name in layers
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return grams


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
