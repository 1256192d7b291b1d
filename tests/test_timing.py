"""Paired timing: buffers rotate beyond the cache, and few pairs prove little."""

import collections

import pytest
import torch
from torch import Tensor

from sparsefx import timing


def test_buffers_rotate_beyond_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "last_level_cache", lambda device: 10_000)
    tensors = (torch.ones(10, 25), torch.zeros(50))  # 1200 bytes
    copies = timing.rotating(tensors, torch.device("cpu"), most=100)
    assert len(copies) == 34  # 34 * 1200 > 4 * 10000 >= 33 * 1200
    assert len({tensor.data_ptr() for copy in copies for tensor in copy}) == 2 * len(copies)
    assert all(torch.equal(a, b) for copy in copies for a, b in zip(copy, tensors, strict=True))


def test_each_copy_has_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "last_level_cache", lambda device: 10_000)
    used = collections.Counter[int]()

    def run(copy: tuple[Tensor, ...]) -> Tensor:
        used[copy[0].data_ptr()] += 1
        return copy[0]

    timing.paired(run, run, (torch.ones(300),), torch.device("cpu"))
    assert len(used) == 34
    assert max(used.values()) - min(used.values()) <= 6  # both run, and two pairs are extra


def test_rotation_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "last_level_cache", lambda device: 2**40)
    monkeypatch.setattr(timing, "BYTES", 4096)
    cpu = torch.device("cpu")
    assert len(timing.rotating((torch.ones(100),), cpu, most=50)) == 10
    assert len(timing.rotating((torch.ones(5000),), cpu, most=50)) == 1, "the layer itself"
    assert len(timing.rotating((torch.ones(0),), cpu, most=50)) == 50


def test_a_gain_that_few_pairs_show_is_not_sure() -> None:
    clear = timing._summary([(10.0, 5.0)] * 5)
    assert (clear.first_us, clear.second_us, clear.bound) == (10.0, 5.0, 0.5)
    mixed = timing._summary([(10.0, 5.0)] * 4 + [(10.0, 30.0)])
    assert mixed.second_us == 5.0
    assert mixed.bound == 3.0, "one of five pairs lost: the median may be on either side"
    many = timing._summary([(10.0, 5.0)] * 80 + [(10.0, 30.0)] * 20)
    assert many.bound == 0.5, "twenty of a hundred lost: the median is surely below"


def one_only(tensors: timing.Copy, device: torch.device, most: int) -> list[timing.Copy]:
    assert most == 1, "no copies are needed"
    return [tensors]


def test_a_slow_and_hopeless_second_is_not_run_often(monkeypatch: pytest.MonkeyPatch) -> None:
    def pairs(first: timing.Run, second: timing.Run, copies: object) -> list[tuple[float, float]]:
        return [(1e5, 9e5), (2e5, 3e5)]

    monkeypatch.setattr(timing, "_cpu_pairs", pairs)
    monkeypatch.setattr(timing, "rotating", one_only)
    took = timing.paired(lambda copy: copy[0], lambda copy: copy[0], (), torch.device("cpu"))
    assert took.bound == 9.0
