"""What was decided about each block, a file a block, so that a run that was stopped can go on.

`block-00003.safetensors` holds the new weights of block 3 by parameter name and, as JSON in its
metadata, the digest of all that they depend on, the block's name, its facts, and a checksum of all
of this.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sparsefx.calibrate.digest import content
from sparsefx.errors import ForeignCalibration
from sparsefx.files import write_atomically

FORMAT = "sparsefx block calibration 2"


@dataclass(frozen=True)
class Record:
    """One block that is done. names: its new weights, by parameter name."""

    block: str
    names: tuple[str, ...]
    facts: Mapping[str, object]


class Store:
    """The blocks that are done, in `folder`; those of an earlier run with this digest included.

    Raises ForeignCalibration if the folder holds blocks of another run, or damaged ones.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        self.records: list[Record] = []
        self._folder, self._digest = folder, digest
        while (path := self._path(len(self.records))).exists():
            self.records.append(self._open(path))

    def add(self, block: str, weights: Mapping[str, Tensor], facts: Mapping[str, object]) -> None:
        """Writes the next block, whole or not at all. Raises OSError."""
        fields: _Fields = {"format": FORMAT, "digest": self._digest, "block": block, "facts": facts}
        tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
        fields["checksum"] = _checksum(fields, tensors.items())
        whole = save(tensors, {"sparsefx": json.dumps(fields)})
        write_atomically(self._path(len(self.records)), whole)
        self.records.append(Record(block, tuple(weights), facts))

    def weight(self, name: str) -> Tensor | None:
        """The new value of a weight, on the CPU; None if no block changed it."""
        for number, record in enumerate(self.records):
            if name in record.names:
                with safe_open(self._path(number), "pt") as file:
                    tensor: Tensor = file.get_tensor(name)
                    return tensor.clone()  # aligned as tensors in memory are
        return None

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every new weight, read one at a time, on the CPU."""
        for number, record in enumerate(self.records):
            if record.names:
                with safe_open(self._path(number), "pt") as file:
                    for name in record.names:
                        yield name, file.get_tensor(name)

    def _path(self, number: int) -> Path:
        return self._folder / f"block-{number:05}.safetensors"

    def _open(self, path: Path) -> Record:
        fields, names, checksum = _read(path)
        if fields.get("format") != FORMAT:
            raise ForeignCalibration(path=path, rule="it holds no block of a calibration")
        if fields.get("checksum") != checksum:
            raise ForeignCalibration(path=path, rule="it is damaged: its checksum is another")
        if fields["digest"] != self._digest:
            rule = "it was begun with another model, recipe or list of batches"
            raise ForeignCalibration(path=path, rule=rule)
        return Record(fields["block"], names, fields["facts"])


class _Fields(TypedDict, total=False):
    """What a file says besides its tensors."""

    format: str
    digest: str
    block: str
    facts: Mapping[str, object]
    checksum: str


def _read(path: Path) -> tuple[_Fields, tuple[str, ...], str]:
    """What a file says, the names of its tensors, and the checksum that it should have."""
    try:
        with safe_open(path, "pt") as file:
            found = json.loads((file.metadata() or {}).get("sparsefx", "{}"))
            fields = cast(_Fields, found if isinstance(found, dict) else {})
            names = tuple(file.keys())
            return (
                fields,
                names,
                _checksum(fields, ((each, file.get_tensor(each)) for each in names)),
            )
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ForeignCalibration(path=path, rule=f"it cannot be read ({error})") from error


def _checksum(fields: _Fields, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Of all the fields but itself, and of the tensors."""
    rest = {key: value for key, value in fields.items() if key != "checksum"}
    contents = sorted((name, content(each)) for name, each in tensors)
    return hashlib.sha256(json.dumps([rest, contents]).encode()).hexdigest()
