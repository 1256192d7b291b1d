"""memory="small": the compiled model holds packed weights alone, and is the same model."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from sparsefx import NM, Block, Recipe, Unstructured
from sparsefx import errors as errs
from sparsefx.by_rows import Dense, Route, Routes
from sparsefx.packed_module import PackedLinear, with_packed_weights
from sparsefx.packing import Packing
from tests.hf_models import ids, llama
from tests.test_api import RECIPE, two

WAYS = {
    "2:4": NM(2, 4),
    "2:4 int8": NM(2, 4, values="int8"),
    "unstructured": Unstructured(0.8),
    "block": Block(16, 16, 0.5),
}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> None:
    torch._dynamo.reset()


class Wide(nn.Module):
    """Two wide linears and one that stays dense."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.down(torch.relu(self.up(x))))
        return y


def wide(way: str = "2:4") -> Wide:
    torch.manual_seed(0)
    recipe = Recipe({"up*": WAYS[way], "down*": WAYS[way]})
    return sparsefx.sparsify(Wide(), recipe, progress=False).eval()


def storage_bytes(model: nn.Module) -> int:
    """Of all distinct storages that a module's tensors hold."""
    tensors = (*model.parameters(), *model.buffers())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize(("way", "guard"), [*((way, "off") for way in WAYS), ("2:4", "model")])
@torch.no_grad()
def test_it_computes_the_same_and_every_layer_has_a_row(way: str, guard: str) -> None:
    model = wide(way)
    fast = sparsefx.compile(model, guard=guard, memory="small")
    assert {type(fast.up), type(fast.down)} == {PackedLinear}
    for rows in (3, 40):
        x = torch.randn(rows, 64)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    report = sparsefx.explain(fast)
    assert not report.check()
    assert {row.name for row in report.rows} == {"up", "down", "head"}
    assert {row.kept_bytes < row.dense_bytes for row in report.rows if row.name != "head"} == {True}


@torch.no_grad()
def test_dense_weights_are_let_go() -> None:
    model = wide()
    before = storage_bytes(model)
    alive = weakref.ref(model.up.weight)
    fast = sparsefx.compile(model, guard="off", memory="small")
    fast(torch.randn(2, 64))
    del model
    gc.collect()
    assert alive() is None, "neither the model, nor its graphs, nor the records hold it"
    assert storage_bytes(fast) < 0.65 * before  # 2:4 of float32 is 9 / 16, the head is dense
    packed = sum(t.nbytes for layer in (fast.up, fast.down) for t in layer.tensors)  # type: ignore[attr-defined]
    rows = [row for row in sparsefx.explain(fast).rows if row.name != "head"]
    assert packed <= sum(row.kept_bytes for row in rows) < sum(row.dense_bytes for row in rows)


@torch.no_grad()
def test_the_users_model_is_untouched() -> None:
    model = wide()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    fast = sparsefx.compile(model, guard="off", memory="small")
    assert type(model.up) is nn.Linear and model.up.weight.requires_grad
    assert fast.head.bias.data_ptr() == model.head.bias.data_ptr(), "what stays dense is shared"
    assert all(torch.equal(model.state_dict()[name], expected[name]) for name in expected)


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_the_state_dict_is_the_dense_one(way: str, tmp_path: Path) -> None:
    model = wide(way)
    fast = sparsefx.compile(model, guard="off", memory="small")
    assert {row.name for row in sparsefx.explain(fast).rows} == {"up", "down", "head"}
    state = fast.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    sparsefx.save(fast, tmp_path / "saved")
    loaded = sparsefx.load(tmp_path / "saved", Wide())
    assert torch.equal(loaded.up.weight, model.up.weight)


@torch.no_grad()
def test_other_weights_of_the_same_pattern_can_be_loaded() -> None:
    fast = sparsefx.compile(wide(), guard="off", memory="small")
    other = wide()
    other.up.weight.mul_(3)
    x = torch.randn(2, 64)
    fast(x)
    fast.load_state_dict(other.state_dict())
    torch.testing.assert_close(fast(x), other(x))
    dense = Wide()
    with pytest.raises(RuntimeError, match="does not fit the packed layer.*more than 2"):
        fast.load_state_dict(dense.state_dict())
    del dense.up.weight
    with pytest.raises(RuntimeError, match="Missing key"):
        fast.load_state_dict(dense.state_dict())


@torch.no_grad()
def test_changes_of_a_packed_weight_are_refused() -> None:
    fast = sparsefx.compile(wide(), guard="off", memory="small")
    weight = fast.up.weight
    assert torch.equal(weight, wide().up.weight)
    for change in (
        lambda: weight.mul_(2),
        lambda: weight.__setitem__(0, 1.0),
        lambda: setattr(fast.up, "weight", nn.Parameter(torch.ones(128, 64))),
    ):
        with pytest.raises(errs.WeightIsPacked, match="memory='small'"):
            change()
    assert type(weight + 1) is Tensor


@torch.no_grad()
def test_tied_hooked_and_dense_layers_stay_as_they_are() -> None:
    model = wide()
    model.head = model.down
    assert type(with_packed_weights(model, {}).down) is nn.Linear
    hooked = wide()
    hooked.up.register_forward_hook(lambda *args: None)
    twin = with_packed_weights(hooked, {})
    assert (type(twin.up), type(twin.down)) == (nn.Linear, PackedLinear)


@torch.no_grad()
def test_a_language_model_generates_the_same() -> None:
    torch.manual_seed(0)
    model = sparsefx.sparsify(llama().model, RECIPE, progress=False)
    fast = sparsefx.compile(model, guard="off", memory="small")
    settings = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(ids(2, 7), **settings)
    assert torch.equal(fast.generate(ids(2, 7), **settings), expected)
    assert {row.kernel for row in sparsefx.explain(fast).rows} > {"cpp_nm_linear"}


def test_calls_with_gradients_on_run_too() -> None:
    model = wide()
    fast = sparsefx.compile(model, guard="off", memory="small")
    x = torch.randn(2, 64)
    torch.testing.assert_close(fast(x), model(x))


@torch.no_grad()
def test_dense_rows_unpack() -> None:
    layer = wide().up
    packing = Packing("nm", n=2, m=4)
    tensors = list(packing.pack(layer.weight.detach()))
    routes = str(Routes((Route(1, ()),), Dense(packing=packing, tensors=(0, 1))))
    x = torch.randn(3, 64)
    operator = torch.ops.sparsefx_rows.linear.default
    result = operator(x, tensors, None, layer.bias, [], routes, 128)
    torch.testing.assert_close(result, layer(x))


@pytest.mark.parametrize("kind", ["", "int8", "int4", "fp8"])
@torch.no_grad()
def test_conversions_change_numbers_and_no_codes(kind: str) -> None:
    recipe = Recipe({"*": NM(2, 4, values=kind)})
    model = sparsefx.sparsify(wide(), recipe, progress=False)
    small = with_packed_weights(model, {}).to(torch.bfloat16)
    assert isinstance(small.up, PackedLinear)
    assert small.up.packing.values == kind
    codes = Packing.of(NM(2, 4, values=kind)).pack(model.up.weight.detach())[0]
    assert small.up.tensors[0].dtype == (codes.dtype if kind else torch.bfloat16)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    expected = model.up.double()(x.double())
    torch.testing.assert_close(small.up(x).double(), expected, rtol=0.02, atol=0.02)


def test_bad_options_are_one_typed_error() -> None:
    with pytest.raises(errs.UnknownOption, match="memory"):
        sparsefx.compile(two(), memory="tiny")
    backend = torch.compile(two(), backend="sparsefx", options={"memory": "small"})
    with torch.no_grad(), pytest.raises(Exception, match="sparsefx.compile"):
        backend(torch.randn(2, 32))
