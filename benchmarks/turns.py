"""Several ways to do one thing, timed in turns in one process, each on weights of its own.

A round runs every side once; the next begins with another side, so that other load and clock
changes meet all of them. What is compared is the ratio within a round, and its median over rounds.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]
Clock = Callable[[Call], float]

FEWEST, MOST = 3, 40  # rounds
TURN = 1e-3  # s that the timed calls of a turn take at least, if CALLS suffice
CALLS = 8
SLOW = 5e-3  # s: a call beyond it has no untimed one before it
# Threads of OpenMP spin for some 5 ms after their last work, those of onnxruntime for 30 ms, and
# would take a core from the side whose turn is next. The kernel counts their time in ticks of 4 ms.
PAUSE, PAUSES = 5e-3, 20


@dataclass(frozen=True)
class Side:
    """One way to compute: calls that do the same, each on a copy of the weights.

    In a model other layers push a weight out of the cache before its next use, so the copies
    together exceed the cache, and every call takes the next one. per_call: how many times one call
    computes (a CUDA graph over all copies).
    """

    name: str
    calls: Sequence[Call]
    per_call: int = 1


def wall(call: Call) -> float:
    """Seconds of one call on the CPU."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cuda(call: Call) -> float:
    """Seconds of one call on the GPU, between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def in_turns(
    sides: Sequence[Side],
    seconds: float,
    clock: Clock = wall,
    fewest: int = FEWEST,
) -> dict[str, list[float]]:
    """Name -> seconds of one computation in each round; `fewest` or more, about `seconds`."""
    turns = {side.name: itertools.cycle(side.calls) for side in sides}
    for side in sides:
        next(turns[side.name])()  # compiles, takes memory
    guess = {side.name: clock(next(turns[side.name])) for side in sides}
    total = sum(max(TURN, taken) + 2 * PAUSE for taken in guess.values())
    rounds = max(fewest, min(int(seconds / total), MOST))
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    for number in range(rounds):
        first = number % len(sides)
        for side in (*sides[first:], *sides[:first]):
            taken = _turn(turns[side.name], guess[side.name], clock)
            times[side.name].append(taken / side.per_call)
    return times


def _turn(calls: "itertools.cycle[Call]", guess: float, clock: Clock) -> float:
    """Mean of a few calls, after one that wakes the threads."""
    _settle()
    if guess < SLOW:
        next(calls)()
    count = min(max(1, round(TURN / max(guess, 1e-9))), CALLS)
    return statistics.fmean(clock(next(calls)) for _ in range(count))


def _settle() -> None:
    """Waits until no thread of this process is running."""
    for _ in range(PAUSES):
        before = time.process_time()
        time.sleep(PAUSE)
        if time.process_time() - before < PAUSE / 10:
            return


def median(times: Sequence[float]) -> float:
    """Of seconds, in microseconds."""
    return 1e6 * statistics.median(times)


def ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """Median over rounds of first / second."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def fastest(times: Mapping[str, Sequence[float]]) -> str:
    """The name of least median."""
    return min(times, key=lambda name: statistics.median(times[name]))
