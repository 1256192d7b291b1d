"""Couplings: what shares an order of channels is found, and any legal order changes no output."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from examples import dinov2
from sparsefx.attributes import get_tensor
from sparsefx.errors import InvalidOrder
from sparsefx.graph import capture
from sparsefx.prune.permute.apply import best_order, permute
from sparsefx.prune.permute.coupling import Coupling, Couplings, find_couplings
from sparsefx.prune.weights import prunable_weights
from tests import hf_models
from tests.permute_models import (
    Convolutions,
    Crossed,
    FusedAttention,
    FusedGate,
    Joined,
    Refused,
    Siblings,
)
from tests.random_modules import sample

NO_KEYWORDS: Mapping[str, object] = {}


def randomised(model: nn.Module) -> nn.Module:
    """Float64, eval, and every parameter and statistic different for each channel."""
    generator = torch.Generator().manual_seed(11)
    model = model.double().eval()
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            if value.is_floating_point():
                value.add_(torch.rand(value.shape, generator=generator, dtype=value.dtype) / 5)
    return model


def found_in(
    model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object] = NO_KEYWORDS
) -> Couplings:
    return find_couplings([capture(model, args, kwargs)], model)


def shuffled(coupling: Coupling, seed: int = 5) -> Tensor:
    """A random legal order: each block in a random one."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.arange(coupling.channels)
    for block in range(int(coupling.blocks.max()) + 1):
        own = (coupling.blocks == block).nonzero().flatten()
        order[own] = own[torch.randperm(len(own), generator=generator)]
    return order


def outputs(
    model: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> list[Tensor]:
    with torch.no_grad():
        result = model(*args, **kwargs)
    return [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor)]


def assert_unchanged(
    model: nn.Module,
    found: Couplings,
    args: tuple[object, ...],
    kwargs: Mapping[str, object] = NO_KEYWORDS,
) -> None:
    """Permutes every coupling and compares all outputs; each consumer must really have changed."""
    before = outputs(model, args, kwargs)
    for coupling in found.found:
        names = [member.name for member in coupling.members]
        old = [get_tensor(model, name).detach().clone() for name in names]
        order = shuffled(coupling)
        assert not torch.equal(order, torch.arange(coupling.channels))
        permute(model, coupling, order)
        assert not any(
            torch.equal(get_tensor(model, name), value)
            for name, value in zip(names, old, strict=True)
        )
    for x, y in zip(before, outputs(model, args, kwargs), strict=True):
        assert (x - y).abs().max() <= 1e-12 * x.abs().max()


def consumers(found: Couplings) -> list[str]:
    return sorted(member.name for each in found.found for member in each.consumers)


def in_double(kwargs: Mapping[str, object]) -> dict[str, object]:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in kwargs.items()
    }


class Norm(nn.RMSNorm):
    """Llama's own norm rounds to float32, which would hide or magnify what is looked for here."""


HUGGING_FACE = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "bert": ("attention.output.dense", "output.dense"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "vit": ("attention.o_proj", "mlp.fc2"),
    "t5_encoder": ("SelfAttention.o", "DenseReluDense.wo"),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_models(name: str) -> None:
    torch.manual_seed(0)
    case = hf_models.CASES[name]()
    model, kwargs = randomised(case.model), in_double(case.kwargs)
    found = found_in(model, (), kwargs)
    for path, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = Norm(32, eps=1e-6, dtype=torch.float64)
            norm.weight = module.weight
            model.set_submodule(path, norm)
    assert_unchanged(model, found, (), kwargs)
    assert len(found.found) == 4 and len(consumers(found)) == 4  # two in each of two layers
    for end in HUGGING_FACE[name]:
        assert sum(weight.endswith(f"{end}.weight") for weight in consumers(found)) >= 2
    assert set(consumers(found)) | set(found.declined) == set(prunable_weights(model))


@pytest.fixture(scope="module")
def llama() -> Couplings:
    case = hf_models.llama()
    return found_in(case.model, (), case.kwargs)


def test_grouped_queries_share_the_order_of_their_value_head(llama: Couplings) -> None:
    attention = next(c for c in llama.found if "o_proj" in c.consumers[0].name)
    assert [member.name for member in attention.producers] == [
        "model.layers.0.self_attn.v_proj.weight"
    ]
    # Four query heads of 8, two to a value head: two blocks of 8, each read twice.
    free = attention.blocks[attention.blocks >= 0]
    assert free.bincount().tolist() == [8, 8]
    labels = attention.consumers[0].labels.view(4, 8)
    assert torch.equal(labels[0], labels[1]) and torch.equal(labels[2], labels[3])
    assert not set(labels[0].tolist()) & set(labels[2].tolist())


def test_gated_mlp_moves_both_projections(llama: Couplings) -> None:
    mlp = next(c for c in llama.found if "down_proj" in c.consumers[0].name)
    assert {member.name.split(".")[-2] for member in mlp.producers} == {"gate_proj", "up_proj"}
    assert mlp.channels == 64 and set(mlp.blocks.tolist()) == {0}


def test_residual_streams_are_declined_with_a_reason() -> None:
    case = hf_models.vit()
    found = found_in(case.model, (), case.kwargs)
    assert "residual stream" in found.declined["layers.1.mlp.fc1.weight"].reason
    assert "residual stream" in found.declined["layers.0.attention.q_proj.weight"].reason
    patches = "embeddings.patch_embeddings.projection.weight"
    assert "input of the model" in found.declined[patches].reason
    assert "output of the model" in found.declined["pooler.dense.weight"].reason


def test_dinov2() -> None:
    model = dinov2.DinoV2Saliency(2)
    model.layer = model.layer[:2]
    model = randomised(model)
    args = (torch.randn(1, 3, 28, 28, dtype=torch.float64),)
    found = found_in(model, args)
    assert consumers(found) == [
        "decoder.final_conv.weight",
        *(f"layer.{i}.{end}.weight" for i in (0, 1) for end in ("attention.output", "mlp.fc2")),
    ]
    assert_unchanged(model, found, args)


def test_convolutions() -> None:
    model, args = randomised(Convolutions()), (torch.randn(2, 3, 9, 9, dtype=torch.float64),)
    found = found_in(model, args)
    assert consumers(found) == [
        "excite.weight", "head.weight", "project.weight", "squeeze.weight"
    ]  # fmt: skip
    wide = next(c for c in found.found if "project.weight" in [m.name for m in c.consumers])
    assert {member.name for member in wide.consumers} == {"project.weight", "squeeze.weight"}
    assert {member.name for member in wide.producers} == {
        *("stem.weight", "depthwise.weight", "depthwise.bias", "excite.weight", "excite.bias"),
        *(f"norm{i}.{leaf}" for i in (1, 2) for leaf in ("weight", "bias", "running_mean",
                                                         "running_var")),
    }  # fmt: skip
    assert "depthwise" in found.declined["depthwise.weight"].reason
    assert_unchanged(model, found, args)


@pytest.mark.parametrize(
    ("model", "blocks"),
    [
        (FusedAttention(), [4, 4, 4, 4]),
        (FusedGate(), [16]),
        (Crossed(), [8, 8]),
        (Joined(), [8, 8]),
        (Siblings(), [16]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layouts(model: nn.Module, blocks: list[int]) -> None:
    width = 16 if isinstance(model, FusedAttention) else 8
    model, args = randomised(model), (torch.randn(2, 5, width, dtype=torch.float64),)
    found = found_in(model, args)
    assert len(found.found) == 1
    free = found.found[0].blocks
    assert free[free >= 0].bincount().tolist() == blocks
    assert_unchanged(model, found, args)


REASONS = {
    "cumulative": "cumsum",
    "flipped": "flip",
    "by what was sorted": "sort",
    "by a constant": "arange",
    "read by the user": "output",
    "residual": "residual",
    "fed back": "",
    "grouped": "groups",
}


@pytest.mark.parametrize("kind", REASONS)
def test_declines(kind: str) -> None:
    model, args = randomised(Refused(kind)), (torch.randn(2, 5, 8, dtype=torch.float64),)
    found = found_in(model, args)
    assert "second.weight" not in consumers(found)
    assert REASONS[kind] in found.declined["second.weight"].reason
    assert_unchanged(model, found, args)


@pytest.mark.parametrize("kind", ["nothing", "by a table"])
def test_the_plain_chain_is_not_declined(kind: str) -> None:
    """What the cases above add is what makes them decline; a table of the model goes along."""
    model, args = randomised(Refused(kind)), (torch.randn(2, 5, 8, dtype=torch.float64),)
    found = found_in(model, args)
    assert consumers(found) == ["second.weight"]
    assert "no captured call reads it" in found.declined["unused.weight"].reason
    names = {member.name for member in found.found[0].producers}
    assert names == {"first.weight", "first.bias"} | ({"table"} if "table" in kind else set())
    assert_unchanged(model, found, args)


def test_weights_that_share_memory_are_left_alone() -> None:
    model = randomised(Refused("nothing"))
    model.second.weight = nn.Parameter(model.first.weight.detach().T)
    args = (torch.randn(2, 5, 8, dtype=torch.float64),)
    assert not found_in(model, args).found
    flat = torch.cat([model.first.weight.detach().flatten()] * 2)  # beside each other, as in a file
    model.first.weight, model.second.weight = (
        nn.Parameter(half.view(8, 8)) for half in flat.split(64)
    )
    found = found_in(model, args)
    assert consumers(found) == ["second.weight"]
    assert_unchanged(model, found, args)


@pytest.mark.parametrize("seed", range(12))
def test_random_modules(seed: int) -> None:
    """Reused, tied, in-place, strided, residual, convolved: whatever is found must be right."""
    drawn = sample(seed)
    model, args = randomised(drawn.module), (drawn.x.double(),)
    assert_unchanged(model, found_in(model, args), args)


def scores_of(model: nn.Module, coupling: Coupling) -> dict[str, Tensor]:
    weights = prunable_weights(model)
    return {
        member.name: weights[member.name].parameter.detach().abs().movedim(member.axis, -1)
        .reshape(-1, weights[member.name].parameter.shape[member.axis])
        for member in coupling.consumers
    }  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "gpt2", "convolutions"])
def test_two_of_four_keeps_more_in_the_order_found(name: str) -> None:
    torch.manual_seed(1)
    if name == "convolutions":
        model, args = Convolutions().double().eval(), (torch.randn(2, 3, 9, 9).double(),)
        kwargs: Mapping[str, object] = NO_KEYWORDS
    else:
        case = hf_models.CASES[name]()
        model, args, kwargs = case.model.double(), (), in_double(case.kwargs)
    found = found_in(model, args, kwargs)
    assert found.found
    before = outputs(model, args, kwargs)
    for coupling in found.found:
        scores = scores_of(model, coupling)
        best = best_order(coupling, scores, 2, 4, work=5_000_000)
        assert best.after > best.before > 0
        permute(model, coupling, best.order)
        again = best_order(coupling, scores_of(model, coupling), 2, 4, work=0)
        assert again.before == pytest.approx(best.after, rel=1e-6)
    for x, y in zip(before, outputs(model, args, kwargs), strict=True):
        assert (x - y).abs().max() <= 1e-6 * x.abs().max()


def test_an_order_of_another_coupling_is_refused() -> None:
    model = randomised(FusedAttention())
    coupling = found_in(model, (torch.randn(2, 5, 16, dtype=torch.float64),)).found[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for order in (
        torch.arange(coupling.channels).flip(0),  # out of the heads
        torch.zeros(coupling.channels, dtype=torch.int64),
        torch.arange(4),
    ):
        with pytest.raises(InvalidOrder, match="out.weight"):
            permute(model, coupling, order)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_blocks_that_are_no_whole_groups_keep_their_order() -> None:
    """Heads of 4 channels, groups of 8: no group lies in one head."""
    model = randomised(FusedAttention())
    coupling = found_in(model, (torch.randn(2, 5, 16, dtype=torch.float64),)).found[0]
    best = best_order(coupling, {"out.weight": model.out.weight.detach().abs()}, 4, 8)
    assert torch.equal(best.order, torch.arange(coupling.channels)) and best.gain == 0


def test_statistics_of_the_input_go_along() -> None:
    """Member.index is what brings norms of a layer's input into the new order."""
    model, x = randomised(FusedGate()), torch.randn(3, 5, 8, dtype=torch.float64)
    coupling = found_in(model, (x,)).found[0]
    seen: list[Tensor] = []
    hook = model.down.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    order = shuffled(coupling)
    model(x)
    permute(model, coupling, order)
    model(x)
    hook.remove()
    (down,) = coupling.consumers
    torch.testing.assert_close(seen[1].norm(dim=0), seen[0].norm(dim=0)[down.index(order)])
