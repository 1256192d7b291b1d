"""Compiles every kernel of `matrix.jobs` for every GPU, in two processes: `make aot`.

python -m tests.aot_all [WORD ..]      only those whose handle and architecture have all words
"""

import json
import queue
import sys
import threading
import time

from sparsefx.codegen.triton.matrix import Job, jobs
from tests.aot_client import Worker
from tests.aot_expected import faults

PROCESSES = 2


def main() -> None:
    """Prints a line for each fault, and how many kernels were compiled in what time."""
    words = sys.argv[1:]
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    wanted = [job for job in jobs() if all(w in f"{job.handle} {job.arch}" for w in words)]
    for job in wanted:
        waiting.put(job)
    wrong: list[str] = []
    start = time.monotonic()
    threads = [threading.Thread(target=_work, args=(waiting, wrong)) for _ in range(PROCESSES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - start
    sys.stdout.write(f"{len(wanted)} kernels in {seconds:.0f} s, {len(wrong)} with faults\n")
    if wrong or waiting.qsize():
        raise SystemExit(1)


def _work(waiting: "queue.SimpleQueue[Job]", wrong: list[str]) -> None:
    with Worker() as worker:
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            answer = worker.ask(json.dumps(job.request()))
            found = faults(job, answer) if answer.pop("ok") else [str(answer["error"])]
            if found:
                wrong.append(job.handle)
                name = f"{job.arch} {job.rows} rows: {job.kernel} of {job.handle}"
                sys.stdout.write(f"{name}: {'; '.join(found)}\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
