"""A process that compiles kernels for GPUs that are not there, for as many tests as ask."""

import json
import os
import subprocess
import sys
from types import TracebackType


class Worker:
    """`python -m sparsefx.codegen.triton.aot_worker`, started without TRITON_INTERPRET."""

    def __enter__(self) -> "Worker":
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sparsefx.codegen.triton.aot_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TRITON_INTERPRET": "0"},
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate(timeout=60)

    def ask(self, line: str) -> dict[str, object]:
        """The answer to one line of input."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(line + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, f"the compiler ended the process on {line}"
        return dict(json.loads(answer))

    def compile(
        self,
        handle: str,
        arch: str,
        rows: int,
        out: int = 1536,
        width: int = 576,
        kernel: str = "kernel",
    ) -> dict[str, object]:
        """The resources of one kernel; fails the test if it does not compile."""
        job = {"handle": handle, "arch": arch, "rows": rows, "kernel": kernel}
        answer = self.ask(json.dumps({**job, "out_features": out, "in_features": width}))
        assert answer.pop("ok"), answer
        return answer

    def compile_attention(
        self, handle: str, arch: str, kernel: str = "kernel"
    ) -> dict[str, object]:
        """The resources of one attention kernel at 4,096 tokens; fails the test if it has none."""
        job = {"handle": handle, "arch": arch, "batch": 1, "queries": 4096, "keys": 4096}
        answer = self.ask(json.dumps({**job, "kernel": kernel}))
        assert answer.pop("ok"), answer
        return answer
