"""A compiled graph holds for one set of weights: what is noticed, compiled and kept."""

import threading
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsefx.detect import Found
from sparsefx.spec import NM
from sparsefx.variants import Variant, Variants
from sparsefx.weights import WeightMemo, version
from tests.compilers import eager_compiler
from tests.pass_models import TWO_FOUR, sparse, x_of


def variant(*weights: Tensor, returns: object = None) -> Variant:
    """Holds for these weights, which come behind one input."""
    bound = tuple((1 + place, each, version(each)) for place, each in enumerate(weights))
    return Variant(lambda *args: returns, bound)


CHANGES: dict[str, Callable[[nn.Parameter], object]] = {
    "in place": lambda w: w.mul_(2),
    "by an index": lambda w: w.__setitem__(0, 1.0),
    "by copy_": lambda w: w.copy_(torch.ones(2)),
    "through a view": lambda w: w[0].zero_(),
    "through detach": lambda w: w.detach().add_(1),
    "of its memory": lambda w: setattr(w, "data", torch.zeros(2)),
}


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_a_change_is_noticed(name: str) -> None:
    weight = nn.Parameter(torch.ones(2))
    held = variant(weight)
    assert held.holds(("x", weight))
    CHANGES[name](weight)
    assert not held.holds(("x", weight))


def test_an_equal_weight_is_another_weight() -> None:
    weight = torch.ones(2)
    assert not variant(weight).holds(("x", weight.clone()))
    assert variant(weight).holds(("another x", weight, "more"))


def test_all_weights_must_hold() -> None:
    first, second = torch.ones(2), torch.ones(2)
    held = variant(first, second)
    assert held.holds(("x", first, second))
    assert not held.holds(("x", second, first))


def test_of_inference_tensors_only_the_memory_is_known() -> None:
    with torch.inference_mode():
        weight = torch.ones(2)
        held = variant(weight)
        weight.mul_(2)  # torch keeps no count: lower refuses to bake such weights
        assert held.holds(("x", weight))
        assert version(weight) == (-1, weight.data_ptr())


class Compiles:
    """Stands for the compiler: a variant for each set of weights, numbered."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, args: Sequence[object]) -> Variant:
        weight = args[1]
        assert isinstance(weight, Tensor)
        self.seen.append(weight)
        return variant(weight, returns=len(self.seen))


def test_the_variant_that_fits_runs_and_others_are_compiled_once() -> None:
    first, second, third = torch.ones(1), torch.ones(1), torch.ones(1)
    compiles = Compiles()
    variants = Variants(variant(first, returns=0), compiles)
    order = [first, second, first, second, third, second, first]
    assert [variants("x", weight) for weight in order] == [0, 1, 0, 1, 2, 1, 0]
    assert len(compiles.seen) == 2


def test_outdated_variants_are_let_go() -> None:
    weight, other = torch.ones(1), torch.ones(1)
    compiles = Compiles()
    variants = Variants(variant(weight, returns=0), compiles)
    assert variants("x", other) == 1
    for expected in range(2, 6):
        weight.mul_(2)
        assert variants("x", weight) == expected
    assert len(variants._all) == 2  # the present form of each weight
    assert variants("x", other) == 1


def test_a_failed_compilation_leaves_the_others_usable() -> None:
    weight = torch.ones(1)

    def fails(args: Sequence[object]) -> Variant:
        raise ValueError("no compiler")

    variants = Variants(variant(weight, returns=0), fails)
    with pytest.raises(ValueError, match="no compiler"):
        variants("x", torch.ones(1))
    assert variants("x", weight) == 0


def test_threads_get_their_own_weights_and_compile_them_once() -> None:
    weights = [torch.ones(1) for _ in range(4)]
    compiles = Compiles()
    variants = Variants(variant(weights[0], returns=0), compiles)
    wrong: list[object] = []
    start = threading.Barrier(8)

    def work(mine: Tensor) -> None:
        start.wait()
        mine_first = variants("x", mine)
        wrong.extend(r for _ in range(300) if (r := variants("x", mine)) != mine_first)

    threads = [threading.Thread(target=work, args=(weights[i % 4],)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(compiles.seen) == 3


# the memo behind them


def test_a_weight_is_searched_once_until_it_changes() -> None:
    memo, weight = WeightMemo(), sparse(TWO_FOUR).weight.detach()
    found = memo.found(weight, False)
    assert found.pattern == NM(2, 4)
    assert memo.found(weight, False) is found
    weight.fill_(1.0)
    assert memo.found(weight, False).pattern is None


def test_packed_forms_are_kept_apart_by_layout_and_orientation() -> None:
    memo, weight, calls = WeightMemo(), torch.arange(6.0).view(2, 3), []

    def pack(stored: Tensor) -> tuple[Tensor, ...]:
        calls.append(tuple(stored.shape))
        return (stored,)

    for layout, transposed in (("a", False), ("a", False), ("b", False), ("a", True), ("a", True)):
        (stored,) = memo.packed(weight, transposed, layout, pack)
        assert torch.equal(stored, weight.t() if transposed else weight)
        assert stored.is_contiguous()
    assert calls == [(2, 3), (2, 3), (3, 2)]
    memo.forget()
    memo.packed(weight, False, "a", pack)
    assert len(calls) == 4


def test_forgetting_while_others_search() -> None:
    memo, errors, stop = WeightMemo(), [], threading.Event()
    weights = [sparse(TWO_FOUR).weight.detach() for _ in range(4)]

    def search() -> None:
        try:
            while not stop.is_set():
                found: list[Found] = [memo.found(weight, False) for weight in weights]
                assert all(each.pattern == NM(2, 4) for each in found)
        except Exception as error:  # noqa: BLE001  # whatever it is, the main thread tells
            errors.append(error)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(300):
        memo.forget()
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []


# through a whole compiler


class Buffered(nn.Module):
    """A layer whose weight is a buffer; a graph break makes one graph of all such layers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.register_buffer("weight", sparse(TWO_FOUR).weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        torch._dynamo.graph_break()
        return torch.tanh(y)


@torch.no_grad()
def test_layers_that_share_a_graph_and_keep_weights_in_buffers() -> None:
    model = nn.Sequential(*(Buffered(seed) for seed in range(3)))
    torch._dynamo.reset()
    compiler = eager_compiler("buffers")
    compiled = torch.compile(model, backend=compiler)
    torch.testing.assert_close(compiled(x_of()), _by_hand(model, x_of()))


def _by_hand(model: nn.Module, x: Tensor) -> Tensor:
    for layer in model.children():
        x = torch.tanh(x.to(layer.weight.dtype) @ layer.weight.t())
    return x


class Changing(nn.Module):
    """Clamps its weight before it uses it."""

    def __init__(self, through_data: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = sparse(TWO_FOUR)
        self.through_data = through_data

    def forward(self, x: Tensor) -> Tensor:
        weight = self.linear.weight
        (weight.data if self.through_data else weight).mul_(1.5)
        return self.linear(x)


@pytest.mark.parametrize("through_data", [False, True])
@torch.no_grad()
def test_a_weight_changed_in_its_own_graph_is_not_packed(through_data: bool) -> None:
    compiled, eager = Changing(through_data), Changing(through_data)
    torch._dynamo.reset()
    compiler = eager_compiler("changing")
    fast = torch.compile(compiled, backend=compiler)
    for _ in range(3):
        torch.testing.assert_close(fast(x_of()), eager(x_of()))
    (row,) = compiler.session.graphs[0].rows
    assert "changed in the graph" in row.reason
