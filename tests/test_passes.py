"""Each pass: how often it rewrites, the text it leaves, the numbers, and its stamps."""

import pytest
import torch
from torch import Tensor, fx

from sparsefx.passes.apply_recipe import ApplyRecipe
from sparsefx.passes.detect import Detect
from sparsefx.passes.fold_masks import FoldMasks
from sparsefx.passes.lower import Lower
from sparsefx.passes.pack_nm import PackNM
from sparsefx.pipeline import Pass
from sparsefx.spec import NM, Recipe
from tests.compilers import accept
from tests.golden import assert_golden
from tests.pass_models import (
    FUSED,
    MASKED,
    PACKED,
    Net,
    after,
    assert_same_numbers,
    text,
    x_of,
)
from tests.plain_target import plain

RECIPE = Recipe({"head.*": NM(1, 4)})

# pass -> (pipeline, count of rewrites in Net, operators that it makes)
STAGES: dict[str, tuple[tuple[Pass, ...], int, set[str]]] = {
    "detect": ((Detect(),), 2, set()),
    "insert_masks": (MASKED, 2, {"sparsefx.mask.default"}),
    "apply_recipe": ((ApplyRecipe(RECIPE),), 1, set()),
    "fold_masks": ((*MASKED, FoldMasks()), 2, set()),
    "pack_nm": ((*MASKED, PackNM()), 1, {"sparsefx.nm_linear.default"}),
    "pack_bitmap": (PACKED, 1, {"sparsefx.bitmap_linear.default"}),
    "fuse_epilogue": (
        FUSED,
        3,
        {"sparsefx.nm_linear.default", "sparsefx.bitmap_linear.default"},
    ),
    "lower": (
        (*FUSED, Lower(plain(), accept)),
        1,
        {
            "sparsefx_plain.linear.default",
            "aten.linear.default",
            "aten.mul.Tensor",
            "aten.add.Tensor",
        },
    ),
}
each_pass = pytest.mark.parametrize("name", STAGES)


@each_pass
def test_count_and_text(name: str) -> None:
    passes, expected, _ = STAGES[name]
    gm, _, counts = after(Net(), passes)
    assert counts[name] == expected
    assert_golden(f"passes/{name}.txt", text(gm))


@each_pass
def test_numbers(name: str) -> None:
    model = Net()
    gm, _, _ = after(model, STAGES[name][0])
    if name == "apply_recipe":
        with torch.no_grad():
            model.head.weight.mul_(NM(1, 4).keep(model.head.weight.abs()))
    assert_same_numbers(gm, model)


@each_pass
def test_new_nodes_are_stamped_and_keep_their_origin(name: str) -> None:
    model = Net()
    gm, _, _ = after(model, STAGES[name][0])
    made = [node for node in gm.graph.nodes if node.meta.get("sparsefx") == name]
    new = {str(node.target) for node in made if node.op == "call_function"}
    assert new == STAGES[name][2]
    values = recorded(gm, x_of())
    for node in made:
        assert node.meta["val"].shape == values[node.name].shape, node.format_node()
        assert node.meta["val"].dtype == values[node.name].dtype, node.format_node()
        if node.op == "call_function":
            assert "tests.pass_models.Net" in str(node.meta["nn_module_stack"])
            assert "forward" in node.meta["stack_trace"]


def recorded(gm: fx.GraphModule, *args: Tensor) -> dict[str, Tensor]:
    """What each node gave in a run."""
    values: dict[str, Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, node: fx.Node) -> object:
            values[node.name] = result = super().run_node(node)
            return result

    with torch.no_grad():
        Recorder(gm).run(*args)
    return values
