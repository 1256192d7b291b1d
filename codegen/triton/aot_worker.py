r"""Ahead-of-time checks in a process of their own: JSON lines in, JSON lines out.

    echo '{"handle": "bitmap float16 linear", "arch": "sm_90", "rows": 9, "out_features": 64,
    "in_features": 96}' | tr -d '\n' | python -m sparsefx.codegen.triton.aot_worker

A job with "keys" is an attention (`aot.compile_attention`), any other a linear. Each answer is
{"ok": true, ...fields of aot.Resources} or {"ok": false, "error": text}. What the compiler prints
when it fails (a whole MLIR module) is dropped; where it ends the process, the reader sees the end
of the output. The process must be started without TRITON_INTERPRET.
"""

import json
import os
import sys
from dataclasses import asdict

from sparsefx.errors import SparseFXError


def answer(line: str) -> dict[str, object]:
    """The answer to one job."""
    from sparsefx.codegen.triton import aot  # imports Triton

    try:
        job = json.loads(line)
        compile_it = aot.compile_attention if "keys" in job else aot.compile_for
        return {"ok": True, **asdict(compile_it(**job))}
    # RuntimeError: how Triton reports a failed MLIR pass; TypeError: a job with other fields;
    # OSError: no place to keep what was compiled
    except (SparseFXError, RuntimeError, TypeError, ValueError, OSError) as error:
        return {"ok": False, "error": f"{type(error).__name__}: {str(error)[:400]}"}


def main() -> None:
    """Answers each line of standard input until it ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    with open(os.devnull, "w") as sink:  # the compiler prints to both
        os.dup2(sink.fileno(), sys.stdout.fileno())
        os.dup2(sink.fileno(), sys.stderr.fileno())
    for line in sys.stdin:
        print(json.dumps(answer(line)), file=answers, flush=True)


if __name__ == "__main__":
    main()
