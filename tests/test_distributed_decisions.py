"""Processes that see different batches decide on the same budgets and the same orders."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import sparsefx
from sparsefx.allocations import ZerothOrder
from sparsefx.annotations import annotations, pruned_layers
from sparsefx.calibrate import together
from sparsefx.errors import NonFiniteLoss, PeerFailed
from sparsefx.prune.allocation.zeroth_order import zeroth_order_scores
from tests.hf_models import llama
from tests.test_permute_kinds import HALF, batches, tasks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

NAMES = ["a", "b"]


def scores(rank: int) -> dict[str, float]:
    """Of a loss that is steeper in the second process."""
    parameters = {name: torch.arange(1.0, 5.0) for name in NAMES}
    slope = torch.tensor([1.0, 3.0])[rank]

    def loss(batch: int) -> float:
        return float(slope * parameters["a"].sum() + parameters["b"].sum())

    return zeroth_order_scores(parameters, loss, 1, ZerothOrder(epsilon=0.1))


def patterns(rank: int) -> str:
    """What a language model's weights are to be, by losses on this process's batches."""
    model = llama().model
    generator = torch.Generator().manual_seed(rank)
    data = [{"input_ids": torch.randint(1, 30, (2, 8), generator=generator)} for _ in range(3)]
    recipe = sparsefx.Recipe(
        {"model.layers.*": sparsefx.Unstructured(0.5)}, allocation=ZerothOrder()
    )
    fast = sparsefx.sparsify(model, recipe, data, progress=False)
    assert len({each.sparsity for each in annotations(fast).values()}) > 1
    return repr(annotations(fast))


def orders(rank: int) -> None:
    """Both have found the order of a's channels, or one of them hangs them on another weight."""
    model, x = tasks()
    recipe = sparsefx.Recipe({"a.weight": HALF}, permute=True)
    for kinds in (("ab", "ab"), ("ab", "ba")):
        data = batches(x + rank, *kinds[rank])
        fast = sparsefx.sparsify(model, recipe, data, progress=False)
        assert not torch.equal(fast.first.weight, model.first.weight)
        same = fast.first.weight.detach().clone()
        together.share_tensors([same])
        assert torch.equal(fast.first.weight, same)
    fast = sparsefx.sparsify(model, recipe, batches(x, *("a", "ab")[rank]), progress=False)
    assert torch.equal(fast.first.weight, model.first.weight)
    assert "in another process" in pruned_layers(fast)["a.weight"].note
    torch.testing.assert_close(fast(x, "b"), model(x, "b"), rtol=0, atol=0)


def fail_alone(rank: int) -> None:
    with pytest.raises(NonFiniteLoss if rank else PeerFailed):
        zeroth_order_scores(
            {"a": torch.ones(2)}, lambda _: float("nan") if rank else 0.0, 1, ZerothOrder()
        )


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    alone = scores(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    found = scores(rank)
    every = torch.tensor([alone[name] for name in NAMES], dtype=torch.float64)
    together.add_up([every])
    assert [found[name] for name in NAMES] == pytest.approx((every / 2).tolist(), rel=1e-12)
    together.check_equal({"scores": found})
    together.check_equal({"patterns": patterns(rank)})
    orders(rank)
    fail_alone(rank)
    dist.destroy_process_group()


def test_two_processes_decide_alike(tmp_path: Path) -> None:
    mp.spawn(work, args=(tmp_path,), nprocs=2)
