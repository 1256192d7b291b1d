"""The four real models through both doors, pruned, against themselves in eager."""

import inspect
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from examples.real_models import dinov2_small, efficientnet_lite0, minilm, smollm2
from sparsefx.graph import capture
from sparsefx.passes import pipelines
from sparsefx.pipeline import PassContext, run
from tests.compilers import eager_compiler

RECIPE = sparsefx.Recipe({"*": sparsefx.Unstructured(0.5)})
DYNAMIC = torch.export.Dim.DYNAMIC


class Real(NamedTuple):
    """A model; inputs of a size; the axes of each input that may vary between sizes."""

    model: nn.Module
    inputs: Callable[[int], dict[str, Tensor]]
    dynamic: dict[str, dict[int, object]]


def text_model(load: Callable[[], tuple[nn.Module, object]]) -> Real:
    def inputs(size: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(size)
        return {"input_ids": torch.randint(1000, 20000, (2 + size, 8 * size), generator=generator)}

    return Real(load()[0], inputs, {"input_ids": {0: DYNAMIC, 1: DYNAMIC}})


def image_model(model: nn.Module, side: int) -> Real:
    argument = next(iter(inspect.signature(model.forward).parameters))

    def inputs(size: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(size)
        return {argument: torch.randn(1 + size, 3, side, side, generator=generator)}

    return Real(model, inputs, {argument: {0: DYNAMIC}})


MODELS: dict[str, Callable[[], Real]] = {
    "smollm2": lambda: text_model(smollm2),
    "minilm": lambda: text_model(minilm),
    "dinov2": lambda: image_model(dinov2_small(), 224),
    "efficientnet": lambda: image_model(efficientnet_lite0(), 64),
}


def first_tensor(result: object) -> Tensor:
    return next(leaf for leaf in torch.utils._pytree.tree_leaves(result) if leaf is not None)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_both_doors(name: str) -> None:
    real = MODELS[name]()
    model = sparsefx.sparsify(real.model.eval(), RECIPE, inplace=True, progress=False)
    extra = {"use_cache": False} if name == "smollm2" else {}
    torch._dynamo.reset()
    compiler = eager_compiler(name)
    compiled = torch.compile(model, backend=compiler)
    for size in (1, 2, 3):  # the second size costs one more graph, the third none
        inputs = real.inputs(size)
        expected = first_tensor(model(**inputs, **extra))
        found = first_tensor(compiled(**inputs, **extra))
        close(found, expected, f"{name}, dynamo door, size {size}")
    assert len(compiler.session.graphs) == 2
    rows = compiler.session.graphs[0].rows
    walked = sum(isinstance(module, nn.Linear) for module in model.modules())
    assert Counter(row.op for row in rows)["linear"] == walked
    assert compiler.session.report().check() == []
    check_export_door(real, model, extra, name)


def check_export_door(real: Real, model: nn.Module, extra: dict[str, object], name: str) -> None:
    inputs = real.inputs(1)
    shapes = {**real.dynamic, **dict.fromkeys(extra)}
    gm = capture(model, (), {**inputs, **extra}, shapes)
    counts = run(gm, pipelines.packing(), PassContext())
    assert counts["pack_bitmap"] + counts["pack_nm"] == counts["detect"] > 0
    for size in (1, 2):
        inputs = real.inputs(size)
        expected = first_tensor(model(**inputs, **extra))
        close(first_tensor(gm(**inputs, **extra)), expected, f"{name}, export door, size {size}")


def close(found: Tensor, expected: Tensor, where: str) -> None:
    # The pruned SmolLM2 magnifies rounding: other sums of the same terms differ by 2e-4 in the end.
    error = (found - expected).abs().max() / expected.abs().max()
    assert error < 1e-3, f"{where}: relative error {error:.2e}"
