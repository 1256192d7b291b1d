"""Two processes that share the calibration data decide as one."""

import errno
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from torch import Tensor

import sparsefx
from sparsefx.calibrate import resume as resuming
from sparsefx.calibrate import spill
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
    for recipes, factors in (((2, 1), (1, 1)), ((2, 2), (1, 2))):
        recipe = sparsefx.Recipe({"*": sparsefx.NM(recipes[rank], 4, sparsefx.Wanda())})
        linear = torch.nn.Linear(8, 8)
        torch.nn.init.constant_(linear.weight, factors[rank])
        torch.nn.init.zeros_(linear.bias)
        with pytest.raises(PeerFailed, match="differ in .*model, patterns or options"):
            sparsefx.sparsify(linear, recipe, [torch.ones(3, 8)], progress=False)
    if rank == 1:
        with torch.no_grad():
            model.get_submodule("encoder.layer.0.intermediate.dense").bias.fill_(float("nan"))
    with pytest.raises(PeerFailed if rank == 0 else NonFiniteActivation):
        run_blocks(model, batches, needs, nothing, progress=False)


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def fail_between_blocks(folder: Path, rank: int) -> None:
    """A disk fills up while values are handed on, or a block that is done cannot be shared."""
    model, batches, needs = calibration()

    def run(failing: int, **options: object) -> None:
        with pytest.raises(OSError if rank == failing else PeerFailed, match="No space|another"):
            run_blocks(model, batches[:2], needs, wanda, progress=False, **options)  # type: ignore[arg-type]

    # Of two batches: read, run up to the first block, its dense outputs, those with new weights.
    for written in (2, 4, 6):
        with pytest.MonkeyPatch.context() as patch:
            write = after(written, spill.write_atomically, rank == 1)
            patch.setattr(spill, "write_atomically", write)
            run(1, max_memory=0)
    state = folder / "between"
    run_blocks(model, batches[:2], needs, wanda, state=state, progress=False).close()
    for failing, name in ((0, "weight"), (1, "add")):
        with pytest.MonkeyPatch.context() as patch:
            if rank == failing:
                patch.setattr(resuming.Store, name, no_space)
            run(failing, state=state)


def after(count: int, write: Callable[[Path, bytes], None], fails: bool) -> Callable[..., None]:
    """Writes `count` times; where it fails, the disk is full then."""
    written: list[Path] = []

    def limited(path: Path, content: bytes) -> None:
        written.append(path)
        if fails and len(written) > count:
            no_space()
        write(path, content)

    return limited


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
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/init",
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=2),
    )
    share = slice(0, 2) if rank == 0 else slice(2, 5)
    decide(folder, rank, share)
    fail_alone(rank)
    fail_between_blocks(folder, rank)
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
