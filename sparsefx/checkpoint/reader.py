"""load(): a sparse checkpoint into a model; everything is checked before anything is copied."""

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sparsefx.annotations import annotate, annotate_attention
from sparsefx.attention.thresholds import AttentionThresholds
from sparsefx.checkpoint.codes import check_codes, loaded_codes, weights_of
from sparsefx.checkpoint.layout import (
    ANNOTATIONS_FILE,
    KEY,
    STORED_NAMES,
    WEIGHTS_FILE,
    BadLayout,
    Entry,
    Layout,
    from_matrix,
    layout_from_json,
    strict_json,
)
from sparsefx.checkpoint.thresholds import THRESHOLDS_KEY, thresholds_from_json
from sparsefx.errors import CheckpointMismatch, CorruptCheckpoint, InvalidPattern, InvalidRecipe
from sparsefx.formats import (
    PackedBitmap,
    PackedNM,
    index_columns,
    unpack_bitmap,
    unpack_bits,
    unpack_nm,
)
from sparsefx.spec import Pattern, Recipe

M = TypeVar("M", bound=nn.Module)


def load(folder: str | Path, model: M) -> M:
    """Copies the checkpoint that `save` wrote in `folder` into `model`, in place; returns `model`.

    Names, shapes and dtypes must be those of `model.state_dict()`: nothing is cast, because a cast
    would silently change the weights; convert the model first. The model's devices are kept. A
    checkpoint of masks alone zeroes the weights that its masks do not keep and leaves the others.
    The annotations of the checkpoint, the thresholds of its attentions among them, are added to the
    model's; whether thresholds have the model's number of heads is found when it is compiled.

    Raises CorruptCheckpoint for a file that is damaged or was made up, CheckpointMismatch for one
    that belongs to another model, OSError for one that cannot be read; `model` is unchanged after
    any of them.
    """
    path = Path(folder) / WEIGHTS_FILE
    notes = _read_annotations(Path(folder) / ANNOTATIONS_FILE)
    targets: dict[str, Tensor] = model.state_dict(keep_vars=True)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            thresholds = _read_thresholds(metadata)
            layout = _checked_layout(path, metadata)
            _check_fits(path, layout, targets, notes)
            for name, entry in layout.entries.items():
                _check_content(name, entry, _parts(file, name, entry))
            with torch.no_grad():
                for name, entry in layout.entries.items():
                    _copy(entry, _parts(file, name, entry), _named(targets, layout, name))
    except (BadLayout, SafetensorError) as error:
        raise CorruptCheckpoint(path=path, rule=str(error)) from error
    annotate(model, notes)
    annotate_attention(model, thresholds)
    return model


def _read_thresholds(metadata: Mapping[str, str]) -> dict[str, AttentionThresholds]:
    text = metadata.get(THRESHOLDS_KEY)
    return {} if text is None else thresholds_from_json(text)


def _checked_layout(path: Path, metadata: Mapping[str, str]) -> Layout:
    """The layout, after comparing it with what the file's header says is stored."""
    text = metadata.get(KEY)
    if text is None:
        raise BadLayout("it is a safetensors file without a sparsefx layout")
    layout = layout_from_json(text)
    stored = _read_header(path)
    for name, entry in layout.entries.items():
        for suffix, (dtype, shape) in entry.parts().items():
            found = stored.pop(name + suffix, None)
            if not _is_stored_as(found, dtype, shape):
                raise BadLayout(f"{name + suffix} is not stored as {dtype} of shape {shape}")
    if stored:
        raise BadLayout(f"{next(iter(stored))} is stored and not in the layout")
    return layout


def _read_header(path: Path) -> dict[str, object]:
    """Tensor name -> its safetensors header entry.

    Parsed once more although safe_open has validated it, because that lets a name occur twice.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = strict_json(file.read(length))
    if not isinstance(header, dict):
        raise BadLayout("its header is not a table")
    header.pop("__metadata__", None)
    return header


def _is_stored_as(found: object, dtype: torch.dtype, shape: tuple[int | None, ...]) -> bool:
    if not isinstance(found, dict) or found["dtype"] != STORED_NAMES[dtype]:
        return False
    sizes = found["shape"]
    return len(sizes) == len(shape) and all(
        expected in (None, size) for size, expected in zip(sizes, shape, strict=True)
    )


def _check_fits(
    path: Path, layout: Layout, targets: Mapping[str, Tensor], notes: Mapping[str, Pattern]
) -> None:
    named = {**{name: name for name in layout.entries}, **layout.aliases}
    missing = set() if layout.masks_only else set(targets) - set(named)
    surplus = (set(named) | set(notes)) - set(targets)
    if missing or surplus:
        what = "has no" if missing else "has"
        name = min(missing or surplus)
        raise _mismatch(path, f"it {what} {name}", "Build the model from the same configuration")
    owner: dict[int, str] = {}
    for name, stored_as in named.items():
        target, entry = targets[name], layout.entries[stored_as]
        if tuple(target.shape) != entry.shape:
            rule = f"{name} is {entry.shape} there and {tuple(target.shape)} in the model"
            raise _mismatch(path, rule, "Build the model from the same configuration")
        if target.is_meta or (target.dtype != entry.dtype and not layout.masks_only):
            rule = f"{name} is {entry.dtype} there and {target.dtype} on {target.device} here"
            raise _mismatch(path, rule, f"Call model.to({entry.dtype}) on a materialised model")
        if owner.setdefault(id(target), stored_as) != stored_as:
            rule = f"{name} is tied to {owner[id(target)]} in the model and not there"
            raise _mismatch(path, rule, "Untie the model's weights before loading")


def _check_content(name: str, entry: Entry, parts: Mapping[str, Tensor]) -> None:
    """Whether indices ascend inside their group and bit counts agree with the stored values."""
    count = entry.kept if entry.kind == "nm" else 0
    if entry.kind == "nm":
        stored = index_columns(parts[":index"], entry.m)
        columns = stored[:, :count].reshape(-1, entry.n)
        if not ((columns < entry.m).all() and (columns[:, 1:] > columns[:, :-1]).all()):
            raise BadLayout(f"{name} has indices that do not ascend below m={entry.m}")
        if stored[:, count:].any():
            raise BadLayout(f"{name} has indices behind its last value")
    elif entry.kind in ("bitmap", "keep"):
        bits = parts[":bits" if entry.kind == "bitmap" else ":keep"]
        padded = unpack_bits(bits, 8 * bits.shape[1])
        if padded[:, entry.columns :].any():
            raise BadLayout(f"{name} has bits set behind its last column")
        count = _set_bits(bits)
        stored_values = -(-count // 2) if entry.values == "int4" else count
        if entry.kind == "bitmap" and stored_values != parts[":values"].shape[0]:
            raise BadLayout(f"{name} has {count} bits set for another number of values")
    if entry.values:
        check_codes(name, entry, parts, loaded_codes(parts[":values"], entry, count))


def _parts(file: safe_open, name: str, entry: Entry) -> dict[str, Tensor]:
    parts = {}
    for suffix in entry.parts():
        parts[suffix] = file.get_tensor(name + suffix)  # type: ignore[no-untyped-call]
    return parts


def _named(targets: Mapping[str, Tensor], layout: Layout, name: str) -> list[Tensor]:
    aliases = [alias for alias, stored in layout.aliases.items() if stored == name]
    return list({id(targets[known]): targets[known] for known in (name, *aliases)}.values())


def _copy(entry: Entry, parts: Mapping[str, Tensor], targets: list[Tensor]) -> None:
    for target in targets:
        if entry.kind == "keep":
            keep = from_matrix(unpack_bits(parts[":keep"], entry.columns), entry.shape, entry.axis)
            target.masked_fill_(~keep.to(target.device), 0)
        else:
            target.copy_(_dense(entry, parts))


def _dense(entry: Entry, parts: Mapping[str, Tensor]) -> Tensor:
    if entry.kind == "dense":
        return parts[""]
    values = parts[":values"]
    if entry.values:
        count = entry.kept if entry.kind == "nm" else _set_bits(parts[":bits"])
        values = loaded_codes(values, entry, count)
    if entry.kind == "nm":
        matrix = unpack_nm(PackedNM(values, parts[":index"]), entry.n, entry.m)
    else:
        row_ptr = torch.empty(0, dtype=torch.int32)  # unpacking all rows needs no offsets
        matrix = unpack_bitmap(PackedBitmap(values, parts[":bits"], row_ptr), entry.columns)
    if entry.values:
        matrix = weights_of(matrix, parts[":scales"], entry)
    return from_matrix(matrix, entry.shape, entry.axis)


def _set_bits(bits: Tensor) -> int:
    return int(unpack_bits(bits, 8 * bits.shape[1]).sum())


def _read_annotations(path: Path) -> dict[str, Pattern]:
    try:
        recipe = Recipe.from_toml(path)
    except FileNotFoundError:
        return {}
    except (InvalidRecipe, InvalidPattern) as error:
        raise CorruptCheckpoint(path=path, rule=str(error)) from error
    if recipe.attention is not None:
        raise CorruptCheckpoint(
            path=path, rule="it has an attention section, which save never writes"
        )
    return {name: pattern for name, pattern in recipe.weights.items() if pattern is not None}


def _mismatch(path: Path, rule: str, remedy: str) -> CheckpointMismatch:
    return CheckpointMismatch(path=path, rule=rule, remedy=remedy)
