"""What once went wrong, or could without a trace: names, dtypes, gradients, bad data."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from sparsefx.annotations import attention_thresholds
from sparsefx.errors import AttentionNotFound, ForeignCalibration, UnknownOption
from sparsefx.spec import Recipe


class Layer(nn.Module):
    """Self-attention, 2 heads of 8; `breaks`: with a graph break before it."""

    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        if self.breaks:
            torch._dynamo.graph_break()
        q, k, v = self.qkv(4 * x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + y.transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(breaks) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


SKIP = sparsefx.SkipSoftmax(scale_factor=80.0, tile=(16, 16))
RECIPE = Recipe(attention=SKIP)
DATA = [torch.randn(1, 128, 16, generator=torch.Generator().manual_seed(3))]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def rows(model: nn.Module) -> list[sparsefx.Row]:
    return [row for row in sparsefx.explain(model).rows if row.op == "attention"]


def test_layers_that_break_the_graph_never_share_thresholds() -> None:
    with pytest.raises(AttentionNotFound, match="breaks Dynamo's graph"):
        sparsefx.compile(Model(breaks=True), recipe=RECIPE, calibration=DATA)
    whole = sparsefx.compile(Model(), recipe=RECIPE, calibration=DATA, guard="off")
    assert list(attention_thresholds(whole)) == [f"layers.{i}" for i in range(3)]


def test_a_declined_attention_keeps_its_number() -> None:
    """The second one of a module is the second whether or not the first could be fused."""

    class Twice(Layer):
        def forward(self, x: Tensor, weights: bool = False) -> tuple[Tensor, ...]:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            p = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
            y = (p @ v).transpose(1, 2).flatten(2)
            return (super().forward(y), p) if weights else (super().forward(y),)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = Twice()

        def forward(self, x: Tensor, weights: bool = False) -> tuple[Tensor, ...]:
            return self.l(x, weights)

    fast = sparsefx.compile(Outer(), recipe=RECIPE, calibration=DATA, guard="off")
    with torch.no_grad():
        fast(DATA[0])
        assert [row.name for row in rows(fast)] == ["l", "l#2"]
        fast(DATA[0], True)
    first, second = rows(fast)[2:]
    assert not first.kernel and "returned" in first.reason
    assert second.kernel and second.name == "l#2"


@torch.no_grad()
def test_autocast_runs_and_says_so() -> None:
    model = Model()
    fast = sparsefx.compile(model, recipe=RECIPE, calibration=DATA, guard="off")
    with torch.autocast("cpu", torch.bfloat16):
        result, expected = fast(DATA[0]), model(DATA[0])
    assert result.dtype == expected.dtype
    for row in rows(fast):
        assert row.kernel or "differ in dtype" in row.reason


def test_gradients_on_is_the_reason() -> None:
    fast = sparsefx.compile(Model(), recipe=RECIPE, calibration=DATA, guard="off")
    fast(DATA[0])
    assert all("gradients are on" in row.reason for row in rows(fast))


@torch.no_grad()
def test_what_the_recipe_leaves_dense_says_so() -> None:
    wanted = Recipe(attention={"layers.1": None, "*": SKIP})
    fast = sparsefx.compile(Model(), recipe=wanted, calibration=DATA, guard="off")
    fast(DATA[0])
    assert "the recipe leaves it dense" in rows(fast)[1].reason


def test_a_new_recipe_replaces_old_thresholds() -> None:
    sparse = sparsefx.sparsify(Model(), RECIPE, DATA, progress=False)
    wanted = Recipe(attention={"layers.1": None, "*": SKIP})
    again = sparsefx.sparsify(sparse, wanted, DATA, progress=False)
    assert set(attention_thresholds(again)) == {"layers.0", "layers.2"}
    given = sparsefx.compile(sparse, recipe=Recipe(attention=SKIP))
    assert attention_thresholds(given) == {}
    assert set(attention_thresholds(sparse)) == {f"layers.{i}" for i in range(3)}


def test_a_metric_sees_the_sparse_model_whatever_the_gradient_mode() -> None:
    model = Model()

    def loss(candidate: nn.Module) -> float:
        assert not candidate.training
        dense = model(DATA[0])
        return 1.0 + float((candidate(DATA[0]) - dense).norm() / dense.norm())

    bound = sparsefx.SkipSoftmax(error=0.5, tile=(16, 16), metric=loss, within=1e-3)
    with torch.enable_grad():
        found = sparsefx.sparsify(model, Recipe(attention=bound), DATA, progress=False)
    fast = sparsefx.compile(found, guard="off")
    with torch.no_grad():
        assert loss(fast.eval()) <= 1.0011


def test_the_state_of_other_weights_is_refused(tmp_path: object) -> None:
    model, other = Model(), Model()
    with torch.no_grad():
        other.layers[1].qkv.weight.mul_(2)
    path = f"{tmp_path}/state"
    sparsefx.sparsify(model, RECIPE, DATA, progress=False, state=path)
    with pytest.raises(ForeignCalibration):
        sparsefx.sparsify(other, RECIPE, DATA, progress=False, state=path)


@pytest.mark.parametrize("data", [DATA[0], {"x": DATA[0]}, "text", 3])
def test_calibration_is_an_iterable_of_batches(data: object) -> None:
    with pytest.raises(UnknownOption, match="an iterable of batches"):
        sparsefx.compile(Model(), recipe=RECIPE, calibration=data)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", ["a", None, 3])
def test_a_batch_is_tensors(batch: object) -> None:
    with pytest.raises(UnknownOption, match="a calibration batch"):
        sparsefx.compile(Model(), recipe=RECIPE, calibration=[batch])


@torch.no_grad()
def test_thresholds_given_to_the_backend_are_checked() -> None:
    options = {"thresholds": {"layers.0": "junk"}}
    with pytest.raises(Exception, match="is not a choice; there are: what attention_thresholds"):
        torch.compile(Model(), backend="sparsefx", options=options)(DATA[0])


@torch.no_grad()
def test_copies_share_nothing() -> None:
    fast = sparsefx.compile(Model(), recipe=RECIPE, calibration=DATA, guard="off")
    twin = copy.deepcopy(fast)
    assert attention_thresholds(twin) == attention_thresholds(fast)


def test_batches_that_come_once_are_read_one_by_one(tmp_path: Path) -> None:
    """Each is at work, and in the state, before the next is drawn."""

    def batches() -> Iterator[object]:
        yield DATA[0]
        assert (tmp_path / "attention.safetensors").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sparsefx.sparsify(Model(), RECIPE, batches(), progress=False, state=tmp_path)


def test_a_state_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(ForeignCalibration, match="it is a file"):
        sparsefx.sparsify(Model(), RECIPE, DATA, progress=False, state=tmp_path / "state")
