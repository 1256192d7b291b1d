"""What the compiler says of Triton kernels for a GPU that is absent: registers, spills, memory."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence

KEPT = ("registers", "spills", "stack", "shared", "instructions")


def resources(
    handles: Sequence[str], arch: str, rows: Sequence[int], out: int, width: int
) -> list[dict[str, object]]:
    """For each handle and its number of rows the fields KEPT of `aot.Resources`, or "error".

    One process compiles all of them: `sparsefx.codegen.triton.aot_worker`.
    """
    sizes = {"arch": arch, "out_features": out, "in_features": width}
    jobs = [
        json.dumps({"handle": handle, "rows": each, **sizes})
        for handle, each in zip(handles, rows, strict=True)
    ]
    done = subprocess.run(
        [sys.executable, "-m", "sparsefx.codegen.triton.aot_worker"],
        input="\n".join(jobs) + "\n",
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        check=False,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    ended = {"ok": False, "error": "the compiler ended the process"}
    answers += [ended] * (len(jobs) - len(answers))
    return [
        {key: answer[key] for key in KEPT} if answer["ok"] else {"error": answer["error"]}
        for answer in answers
    ]
