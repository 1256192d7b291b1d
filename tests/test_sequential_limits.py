"""The sequential driver when memory is short, a run is stopped, or what it is given is bad."""

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparsefx.calibrate import sequential
from sparsefx.calibrate.sequential import Block, Results, Visited, run_blocks
from sparsefx.calibrate.spill import Shelf
from sparsefx.calibrate.statistics import Gram, SquareSum
from sparsefx.errors import (
    EmptyCalibration,
    ForeignCalibration,
    NonFiniteActivation,
    NotCapturable,
    ShapeMismatch,
    SparseFXError,
    UnknownOption,
    UnobservedLayer,
)
from tests import hf_models
from tests.block_visits import GRAM, Recorder, needs_of, nothing, varied, wanda


class Spy(Shelf):
    """Remembers the shelves that a run makes, and how many entries went to disk."""

    made: list["Spy"] = []

    def __init__(self, limit: int | None, folder: Path) -> None:
        super().__init__(limit, folder)
        self.folder = folder
        self.sizes: list[int] = []
        self.files = 0
        Spy.made.append(self)

    def put(self, values: list[object]) -> int:
        ticket = super().put(values)
        self.sizes.append(sum(each.nbytes for each in values if isinstance(each, Tensor)))
        self.files = max(self.files, len(list(self.folder.iterdir())))
        return ticket


@pytest.fixture
def shelves(monkeypatch: pytest.MonkeyPatch) -> list[Spy]:
    monkeypatch.setattr(Spy, "made", [])
    monkeypatch.setattr(sequential, "Shelf", Spy)
    return Spy.made


def same(first: Results, second: Results) -> bool:
    one, other = dict(first.weights()), dict(second.weights())
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("case", ["bert", "vit"])
def test_activations_beyond_max_memory_go_to_disk(case: str, shelves: list[Spy]) -> None:
    model, batch, _, _ = hf_models.CASES[case]()
    batches = varied(batch, 4)
    needs = needs_of(model)
    with (
        run_blocks(model, batches, needs, wanda, progress=False) as free,
        run_blocks(model, batches, needs, wanda, max_memory=6000, progress=False) as bounded,
        run_blocks(model, batches, needs, wanda, max_memory=0, progress=False) as on_disk,
    ):
        assert same(free, bounded) and same(free, on_disk)
        assert bounded.facts == free.facts
    assert shelves[0].peak > 6000 and shelves[0].files == 0
    assert 0 < shelves[1].peak <= 6000 and shelves[1].files > 0
    assert shelves[2].peak == 0 and shelves[2].files >= 4
    assert not any(shelf.folder.exists() for shelf in shelves)


def test_what_is_the_same_for_every_batch_is_not_kept_per_batch(shelves: list[Spy]) -> None:
    model, batch, _, _ = hf_models.llama(2, 7)
    run_blocks(model, varied(batch, 3), needs_of(model), wanda, progress=False).close()
    hidden = 2 * 7 * 32 * 4
    # Tokens; then hidden states alone, though rope tables and a causal mask live on as well.
    assert shelves[0].sizes[:3] == [2 * 7 * 8] * 3
    assert set(shelves[0].sizes[3:]) == {hidden}
    assert shelves[0].peak <= 6 * hidden


class Stop(Recorder):
    """Is interrupted at one block."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._at = at

    def __call__(self, block: Block) -> Visited:
        if block.number == self._at:
            raise KeyboardInterrupt
        return super().__call__(block)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(tmp_path: Path, at: int) -> None:
    model, batch, _, _ = hf_models.bert()
    batches, needs = varied(batch, 2), needs_of(model)
    with run_blocks(model, batches, needs, wanda, progress=False) as whole:
        with pytest.raises(KeyboardInterrupt):
            run_blocks(model, batches, needs, Stop(at), state=tmp_path, progress=False)
        assert len(list(tmp_path.iterdir())) == at
        rest = Recorder()
        with run_blocks(model, batches, needs, rest, state=tmp_path, progress=False) as resumed:
            assert same(whole, resumed)
            assert resumed.facts == whole.facts
    assert len(rest.blocks) == 3 - at
    assert len(list(tmp_path.iterdir())) == 3  # the state stays, and answers at once
    with run_blocks(model, batches, needs, Stop(0), state=tmp_path, progress=False) as again:
        assert len(dict(again.weights())) == len(needs)


def test_a_state_of_another_run_is_refused(tmp_path: Path) -> None:
    model, batch, _, _ = hf_models.gpt2()
    batches, needs = varied(batch, 2), needs_of(model)

    def run(batches: list[dict[str, object]], digest: str) -> None:
        run_blocks(
            model, batches, needs, wanda, state=tmp_path, digest=digest, progress=False
        ).close()

    run(batches, "one")
    run(batches, "one")
    with pytest.raises(ForeignCalibration, match="another model"):
        run(batches, "two")
    with pytest.raises(ForeignCalibration, match="list of batches"):
        run(batches[::-1], "one")
    (tmp_path / "block-00000.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ForeignCalibration, match="cannot be read"):
        run(batches, "one")


@pytest.mark.parametrize("spilled", [False, True])
def test_a_disk_that_fills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spilled: bool) -> None:
    model, batch, _, _ = hf_models.gpt2()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    write, written = Path.write_bytes, []

    def full(path: Path, content: bytes) -> int:
        written.append(path)
        if len(written) > 1:
            write(path, content[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    limit = 0 if spilled else None
    with pytest.raises(OSError, match="No space left"):
        run_blocks(
            model, varied(batch, 2), needs_of(model), wanda,
            state=tmp_path, max_memory=limit, progress=False,
        )  # fmt: skip
    whole = [] if spilled else ["block-00000.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == whole
    assert not any(path.exists() for path in written[1:])
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())


def test_a_generator_that_fills_one_tensor_again() -> None:
    model = hf_models.gpt2().model
    parts = hf_models.ids(3, 6).split(1)

    def again() -> Iterator[dict[str, object]]:
        buffer = torch.empty_like(parts[0])
        for part in parts:
            yield {"input_ids": buffer.copy_(part), "use_cache": False}

    with (
        run_blocks(model, again(), needs_of(model), wanda, progress=False) as filled,
        run_blocks(
            model, [{"input_ids": part, "use_cache": False} for part in parts], needs_of(model),
            wanda, progress=False,
        ) as listed,
    ):  # fmt: skip
        assert same(filled, listed)


def test_no_batch() -> None:
    model = hf_models.gpt2().model
    with pytest.raises(EmptyCalibration):
        run_blocks(model, [], needs_of(model), wanda, progress=False)


def test_one_sample() -> None:
    model, batch, _, _ = hf_models.llama(1, 1)
    with run_blocks(model, [batch], needs_of(model), wanda, progress=False) as results:
        assert len(dict(results.weights())) == 15


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_activations_name_the_layer_and_the_batch(bad: float) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight[0, 0] = bad
    batches = [torch.zeros(2, 4), torch.zeros(2, 4)]
    batches[1][0, 0] = 1
    model[0].bias = None
    with pytest.raises(NonFiniteActivation, match="the input of 2.weight") as caught:
        run_blocks(model, batches, needs_of(model), nothing, progress=False)
    # 0 * inf is NaN too, so the first batch already has them.
    assert caught.value.fields["batch"] == 0
    batches[1][0, 0] = bad
    with pytest.raises(NonFiniteActivation, match="the input of 0.weight.*batch 1"):
        run_blocks(model, batches, needs_of(model), nothing, progress=False)


def test_large_finite_activations_are_no_error() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    x = torch.full((4, 2), 3e38)  # their sum is infinite
    needs = {"0.weight": frozenset({"histogram"})}
    run_blocks(model, [x], needs, lambda block: Visited(), progress=False).close()


def test_a_layer_that_never_runs() -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.used(x)
            return out

    model = Idle()
    with pytest.raises(UnobservedLayer, match="idle.weight"):
        run_blocks(model, [torch.ones(1, 3)], needs_of(model), wanda, progress=False)
    seen: list[str] = []
    needs = {"used.weight": GRAM, "idle.weight": frozenset[str]()}

    def visit(block: Block) -> Visited:
        seen.extend(block.layers)
        return Visited()

    run_blocks(model, [torch.ones(1, 3)], needs, visit, progress=False).close()
    assert seen == ["used.weight", "idle.weight"]


def test_a_model_that_cannot_be_captured() -> None:
    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.fc(x) if bool(x.sum() > 0) else x
            return out

    model = Choosing()
    with pytest.raises(NotCapturable, match="Choosing with calibration batch 0"):
        run_blocks(model, [torch.ones(1, 3)], needs_of(model), wanda, progress=False)
    with pytest.raises(UnknownOption, match="a calibration batch"):
        run_blocks(model, ["text"], needs_of(model), wanda, progress=False)


@pytest.mark.parametrize(
    ("weights", "error"),
    [
        ({"0.weight": torch.zeros(3, 4)}, ShapeMismatch),
        ({"0.weight": torch.zeros(4, 4, dtype=torch.float64)}, ShapeMismatch),
        ({"1.weight": torch.zeros(4, 4)}, UnknownOption),
    ],
)
def test_a_visit_that_returns_what_does_not_fit(
    weights: dict[str, Tensor], error: type[SparseFXError]
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(error):
        run_blocks(
            model, [torch.ones(1, 4)], needs_of(model), lambda block: Visited(weights),
            progress=False,
        )  # fmt: skip


def test_statistics_do_not_depend_on_how_tokens_are_batched() -> None:
    model = hf_models.gpt2().model
    whole = hf_models.ids(4, 6)
    found = []
    for parts in (whole.split(4), whole.split(1)):
        recorder = Recorder(nothing)
        batches = [{"input_ids": part, "use_cache": False} for part in parts]
        run_blocks(model, batches, needs_of(model), recorder, progress=False).close()
        found.append(recorder)
    assert found[0].counts == found[1].counts
    for name, gram in found[0].grams.items():
        torch.testing.assert_close(found[1].grams[name], gram, rtol=1e-4, atol=1e-5)


def test_squares_are_the_diagonal_of_the_gram() -> None:
    model, batch, _, _ = hf_models.bert()  # of 14 tokens 2 are padding
    counts: list[list[int]] = []

    def visit(block: Block) -> Visited:
        for layer in block.layers.values():
            squares, gram = (layer.statistics[0][kind] for kind in ("squares", "gram"))
            assert isinstance(squares, SquareSum) and isinstance(gram, Gram)
            torch.testing.assert_close(squares.norms, gram.norms, rtol=1e-5, atol=1e-7)
            counts.append(squares.count.tolist())
            assert counts[-1] == gram.count.tolist()
        return Visited()

    needs = needs_of(model, frozenset({"squares", "gram"}))
    run_blocks(model, [batch], needs, visit, progress=False).close()
    assert counts == [[12, 2]] * 12 + [[2, 2]]  # the pooler sees the first token only
