"""Two processes that share the calibration data decide as one."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsefx.calibrate.sequential import Block, Visited, run_blocks
from sparsefx.errors import EmptyCalibration, NonFiniteActivation, PeerFailed
from sparsefx.prune.weights import prunable_weights
from tests import hf_models
from tests.block_visits import Recorder, needs_of, nothing, varied, wanda

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


def calibration() -> tuple[torch.nn.Module, list[dict[str, object]], dict[str, frozenset[str]]]:
    torch.manual_seed(0)
    model, batch, _, _ = hf_models.bert()
    needs = {
        name: frozenset({"gram", "moments"})
        for name, each in prunable_weights(model).items()
        if not each.held_back
    }
    return model, varied(batch, 5), needs


def decide(folder: Path, rank: int, share: slice) -> None:
    """Writes grams, new weights and facts of a run on `share` of the batches."""
    model, batches, needs = calibration()
    seen = Recorder()
    with run_blocks(model, batches[share], needs, seen, progress=False) as results:
        weights = {name: each.clone() for name, each in results.weights()}
        assert [facts["block"] for facts in results.facts][-1] == "pooler.dense"
    save_file(seen.grams, folder / f"grams-{rank}.safetensors")
    save_file(weights, folder / f"weights-{rank}.safetensors")


def fail_alone(rank: int) -> None:
    """One process has no batch, or a bad one, or another set of layers: both end, each its way."""
    model, batches, needs = calibration()
    with pytest.raises(PeerFailed if rank == 0 else EmptyCalibration):
        run_blocks(model, batches[: 1 - rank], needs, nothing, progress=False)
    with pytest.raises(PeerFailed, match="differ in blocks, layers"):
        run_blocks(model, batches, dict(list(needs.items())[rank:]), nothing, progress=False)
    if rank == 1:
        with torch.no_grad():
            model.get_submodule("encoder.layer.0.intermediate.dense").bias.fill_(float("nan"))
    with pytest.raises(PeerFailed if rank == 0 else NonFiniteActivation):
        run_blocks(model, batches, needs, nothing, progress=False)


def differ(rank: int) -> None:
    """What the first process decides holds in all."""
    model, batches, needs = calibration()

    def visit(block: Block) -> Visited:
        weights = {
            name: torch.full_like(layer.weight.parameter, float(rank + 1))
            for name, layer in block.layers.items()
        }
        return Visited(weights if rank == 0 else {}, {"rank": rank, "name": "é"})

    with run_blocks(model, batches, needs, visit, progress=False) as results:
        assert all(bool((each == 1).all()) for _, each in results.weights())
        assert results.facts == [{"rank": 0, "name": "é"}] * 3


def resume(folder: Path, rank: int, share: slice) -> None:
    """Stopped behind the first block in both processes, then run to its end."""
    model, batches, needs = calibration()

    def stop(block: Block) -> Visited:
        if block.number:
            raise KeyboardInterrupt
        return wanda(block)

    state = folder / "state" if rank == 0 else folder / "not seen by the first"
    with pytest.raises(KeyboardInterrupt):
        run_blocks(model, batches[share], needs, stop, state=state, progress=False)
    with run_blocks(model, batches[share], needs, wanda, state=state, progress=False) as results:
        weights = {name: each.clone() for name, each in results.weights()}
        assert len(results.facts) == 3
    assert state.exists() == (rank == 0)
    save_file(weights, folder / f"resumed-{rank}.safetensors")


def route(share: slice) -> dict[str, Tensor]:
    """Grams of all layers of a mixture of experts, on `share` of the batches."""
    torch.manual_seed(0)
    model, batch, _, _ = hf_models.mixtral()
    seen = Recorder(nothing)
    run_blocks(model, varied(batch, 5)[share], needs_of(model), seen, progress=False).close()
    return seen.grams


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    share = slice(0, 2) if rank == 0 else slice(2, 5)
    decide(folder, rank, share)
    fail_alone(rank)
    differ(rank)
    resume(folder, rank, share)
    save_file(route(share), folder / f"experts-{rank}.safetensors")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path: Path) -> None:
    mp.spawn(work, args=(tmp_path,), nprocs=2)
    model, batches, needs = calibration()
    seen = Recorder(nothing)
    run_blocks(model, batches, needs, seen, progress=False).close()

    def read(kind: str) -> list[dict[str, Tensor]]:
        return [load_file(tmp_path / f"{kind}-{rank}.safetensors") for rank in range(2)]

    first, second = read("weights")
    assert first.keys() == needs.keys()
    assert all(torch.equal(first[name], second[name]) for name in needs)
    for resumed in read("resumed"):
        assert all(torch.equal(first[name], resumed[name]) for name in needs)
    with run_blocks(model, batches, needs, Recorder(), progress=False) as alone:
        for name, weight in alone.weights():
            # Rounding may tip the order of two scores, no more.
            assert ((weight == 0) == (first[name] == 0)).float().mean() > 0.995
    for name in (name for name in needs if name.startswith("encoder.layer.0.attention.self")):
        for grams in read("grams"):
            torch.testing.assert_close(grams[name], seen.grams[name], rtol=1e-5, atol=1e-5)
    alone = route(slice(None))
    assert alone["model.layers.0.mlp.experts.down_proj"].shape == (4, 64, 64)
    for name, gram in alone.items():
        for grams in read("experts"):
            torch.testing.assert_close(grams[name], gram, rtol=1e-5, atol=1e-5)
