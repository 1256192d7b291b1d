"""Compiles kernels in several processes before they are timed: Triton's disk cache is warm then.

Triton compiles in the process that launches, one kernel after the other. Here `aot_worker`
processes, which need no GPU, compile what a launch on the device would ask for: the cache's key is
the kernel, how its arguments are specialised, and the device's architecture.
"""

import contextlib
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

PROCESSES = 4
_SMALL = 128  # rows of W: how many there are is no part of a compiled kernel, but see `_small`


@dataclass(frozen=True)
class Request:
    """A kernel by its handle, and a call's sizes."""

    handle: str
    rows: int
    out_features: int
    in_features: int


@dataclass(frozen=True)
class Outcome:
    """What became of a request: `error` is "" or why it did not compile; spills and shared bytes.

    A kernel that spills registers is not worth timing.
    """

    error: str
    spills: int = 0
    shared: int = 0


def architecture() -> str | None:
    """The name in `aot.TARGETS` of the GPU at hand, or None where there is none."""
    if not torch.cuda.is_available():
        return None
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties().gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def precompile(
    requests: Sequence[Request],
    arch: str,
    processes: int = PROCESSES,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Request, Outcome]:
    """Compiles all `requests` for `arch`; `progress` is told (done, of) after each.

    A process that the compiler ends is an outcome too: the others go on, and so does a new one.
    """
    distinct = list(dict.fromkeys(requests))
    waiting: queue.SimpleQueue[Request] = queue.SimpleQueue()
    for request in distinct:
        waiting.put(request)
    outcomes: dict[Request, Outcome] = {}

    def work() -> None:
        worker: _Worker | None = None
        while (request := _next(waiting)) is not None:
            worker = worker or _Worker()
            answer = worker.ask(request, arch)
            if answer is None:
                worker.close()
                worker = None
            outcomes[request] = answer or Outcome("the compiler ended its process")
            if progress is not None:
                progress(len(outcomes), len(distinct))
        if worker is not None:
            worker.close()

    count = min(processes, len(distinct))
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def _next(waiting: "queue.SimpleQueue[Request]") -> Request | None:
    try:
        return waiting.get_nowait()
    except queue.Empty:
        return None


class _Worker:
    """One `aot_worker` process."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sparsefx.codegen.triton.aot_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, request: Request, arch: str) -> Outcome | None:
        """None where the process has ended."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.write(json.dumps(_job(request, arch)) + "\n")
            stdin.flush()
        except BrokenPipeError:
            return None
        line = stdout.readline()
        if not line:
            return None
        answer = json.loads(line)
        if not answer["ok"]:
            return Outcome(str(answer["error"]))
        return Outcome("", int(answer["spills"]), int(answer["shared"]))

    def close(self) -> None:
        """Ends the process, if it has not ended by itself."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        with contextlib.suppress(BrokenPipeError):
            stdin.close()
        stdout.close()
        self._process.wait()


def _job(request: Request, arch: str) -> dict[str, str | int]:
    return {
        "handle": request.handle,
        "arch": arch,
        "rows": request.rows,
        "out_features": _small(request.out_features),
        "in_features": request.in_features,
    }


def _small(out_features: int) -> int:
    """Fewer rows of W that Triton specialises a kernel for in the same way: it asks whether 16
    divides the number. Weights are made up for the compiler, and large ones take long to pack.
    """
    if out_features <= _SMALL:
        return out_features
    return _SMALL + (out_features % 16 and 2 - out_features % 2)
