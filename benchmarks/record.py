"""What a figure needs to be believed: the machine, the versions, the date; as text and as JSON."""

import importlib.metadata
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

import torch

from sparsefx.files import write_atomically

PACKAGES = ("sparsefx", "torch", "triton", "onnxruntime", "transformers")


def machine() -> dict[str, str]:
    """Processor or GPU, threads, load at this moment, versions, date (UTC)."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "processor": _processor(),
        **gpu,
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "load": " ".join(f"{load:.1f}" for load in os.getloadavg()) + " (1, 5, 15 minutes)",
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in PACKAGES},
    }


def write(path: Path, options: dict[str, object], results: list[dict[str, object]]) -> None:
    """Keeps `results` with the machine and the benchmark's options as one JSON file."""
    content = {"machine": machine(), "options": options, "results": results}
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
