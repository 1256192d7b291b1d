"""Compiles kernels in several processes before they are timed: Triton's disk cache is warm then.

Triton compiles in the process that launches, one kernel after the other. Here `aot_worker`
processes, which need no GPU, compile what a launch on the device would ask for: the cache's key is
the kernel, how its arguments are specialised, and the device's architecture.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from sparsefx.codegen.triton import library
from sparsefx.target import LinearSpec, Lowering

PROCESSES = 4
ENDED = "the compiler ended its process"
IDLE = 20.0  # s after which processes that wait for work end; each takes seconds to start
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from sparsefx.codegen.triton.aot_worker import main; main()"
)
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
    """What became of a request: `error` is "" or why it did not compile; bytes spilled, shared."""

    error: str
    spills: int = 0
    shared: int = 0

    @property
    def fault(self) -> str:
        """Why it is not worth timing, or "".

        A kernel that does not compile says so itself when it is launched; one that ends the
        compiler's process would end the user's.
        """
        spilled = "its registers do not suffice on this GPU: some spill to memory"
        return ENDED if self.error == ENDED else spilled if self.spills else ""


def architecture() -> str | None:
    """What `aot` calls the GPU at hand; None where there is none or kernels are interpreted."""
    if not torch.cuda.is_available() or not library.installed() or library.interpreting():
        return None
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties().gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def inspect(asked: Sequence[tuple[LinearSpec, Lowering]]) -> list[str]:
    """`target.Inspect` for the GPU at hand: compiled, spilling nothing, within shared memory.

    Kernels of other operators, and all where no GPU compiles them, are taken as they are.
    """
    arch = architecture()
    if arch is None:
        return [""] * len(asked)
    requests = [_request(spec, lowering) for spec, lowering in asked]
    outcomes = POOL.compile([each for each in requests if each is not None], arch)
    return ["" if each is None else outcomes[each].fault for each in requests]


def _request(spec: LinearSpec, lowering: Lowering) -> Request | None:
    if lowering.op is not torch.ops.sparsefx_triton.linear.default:
        return None
    return Request(lowering.handle, max(1, spec.rows), spec.out_features, spec.in_features)


@dataclass
class Pool:
    """Processes that compile, kept for the next kernels until they have waited for IDLE."""

    processes: int = PROCESSES
    _idle: "queue.LifoQueue[_Worker]" = field(default_factory=queue.LifoQueue)
    closing: threading.Timer | None = None

    def compile(self, requests: Sequence[Request], arch: str) -> dict[Request, Outcome]:
        """Compiles each distinct request for `arch`.

        A process that the compiler ends is an outcome too: the others go on, and so does a new one.
        """
        if self.closing is not None:
            self.closing.cancel()
        distinct = list(dict.fromkeys(requests))
        with ThreadPoolExecutor(max_workers=self.processes) as threads:
            found = list(threads.map(lambda request: self._answer(request, arch), distinct))
        self.closing = threading.Timer(IDLE, self.close)
        self.closing.daemon = True
        self.closing.start()
        return dict(zip(distinct, found, strict=True))

    def close(self) -> None:
        """Ends the processes that are waiting."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._idle.get_nowait().close()

    def waiting(self) -> int:
        """How many processes wait for work."""
        return self._idle.qsize()

    def forget(self) -> None:
        """Leaves the processes to the parent of a forked process."""
        self._idle = queue.LifoQueue()

    def _answer(self, request: Request, arch: str) -> Outcome:
        try:
            worker = self._running() or _Worker()
        except OSError as error:
            return Outcome(str(error))
        answer = worker.ask(request, arch)
        if answer is not None:
            worker.has_answered = True
            self._idle.put(worker)
            return answer
        worker.close()
        # One that never answered may lack what this process has; that says nothing of the kernel.
        return Outcome(ENDED if worker.has_answered else "no process that compiles would start")

    def _running(self) -> "_Worker | None":
        """One that waits and has not ended meanwhile."""
        with contextlib.suppress(queue.Empty):
            while True:
                worker = self._idle.get_nowait()
                if worker.is_running():
                    return worker
                worker.close()
        return None


class _Worker:
    """One `aot_worker` process, which imports what this process would."""

    def __init__(self) -> None:
        self.has_answered = False
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START, json.dumps(sys.path)],
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
        try:
            answer = json.loads(stdout.readline())
        except ValueError:  # the end of it, or something that another library printed
            return None
        if not answer["ok"]:
            return Outcome(str(answer["error"]))
        return Outcome("", int(answer["spills"]), int(answer["shared"]))

    def is_running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def close(self) -> None:
        """Ends the process, if it has not ended by itself."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        with contextlib.suppress(BrokenPipeError):
            stdin.close()
        stdout.close()
        self._process.terminate()  # a forked process may hold its input open
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


POOL = Pool()
os.register_at_fork(after_in_child=POOL.forget)
