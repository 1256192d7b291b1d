"""Calibration statistics in a file, so that a calibration that was stopped can go on."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sparsefx.errors import ForeignCalibration
from sparsefx.files import write_atomically

FORMAT = "sparsefx attention calibration 1"


@dataclass(frozen=True)
class Saved:
    """What a state file holds.

    done: how many batches went in; header: whatever JSON describes the tensors; tensors by name.
    """

    done: int
    header: object
    tensors: Mapping[str, Tensor]


def write(path: Path, digest: str, saved: Saved) -> None:
    """Replaces the file as a whole. digest: of all that the numbers depend on but the data."""
    fields = {"format": FORMAT, "digest": digest, "done": saved.done, "header": saved.header}
    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in saved.tensors.items()}
    write_atomically(path, save(tensors, {"sparsefx": json.dumps(fields)}))


def read(path: Path, digest: str) -> Saved | None:
    """What the file holds, None if there is none. Raises ForeignCalibration, OSError."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            fields = json.loads((file.metadata() or {}).get("sparsefx", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ForeignCalibration(path=path, rule=f"it cannot be read ({error})") from error
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise ForeignCalibration(path=path, rule="it holds no calibration")
    if fields.get("digest") != digest:
        raise ForeignCalibration(path=path, rule="it was begun with another model, recipe or tile")
    return Saved(int(fields["done"]), fields["header"], tensors)
