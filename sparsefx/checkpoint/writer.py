"""save(): a model as a sparse checkpoint, each tensor in the smallest layout that holds it."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsefx.annotations import annotations, attention_thresholds
from sparsefx.checkpoint.codes import coded, pack_codes, stored_codes
from sparsefx.checkpoint.layout import (
    ANNOTATIONS_FILE,
    KEY,
    PACKABLE,
    RECIPE_FILE,
    STORED_NAMES,
    WEIGHTS_FILE,
    BadLayout,
    Entry,
    Layout,
    as_matrix,
)
from sparsefx.checkpoint.thresholds import THRESHOLDS_KEY, thresholds_to_json
from sparsefx.detect import MINIMUM_SPARSITY, count_zeros
from sparsefx.errors import CheckpointMismatch
from sparsefx.files import replacing
from sparsefx.formats import pack_bitmap, pack_bits, pack_nm
from sparsefx.spec import Pattern, Recipe


def save(
    model: nn.Module,
    folder: str | Path,
    *,
    recipe: Recipe | None = None,
    masks_only: bool = False,
) -> None:
    """Writes `model` into `folder` (created) as model.safetensors, annotations.toml, recipe.toml.

    Every tensor of `model.state_dict()` is stored N:M, as bitmap or dense, whichever takes the
    fewest bytes, weights that `sparsify` rounded to codes as codes and scales; loading gives back
    the same bits, except that `-0.0` in a packed tensor becomes `0.0`. Tied tensors are stored
    once. `masks_only` stores, instead of any value, one bit per element for each weight that is
    annotated or at least a quarter zero. The thresholds of the model's attentions go into the same
    file. Without `recipe`, a recipe.toml from an earlier save is removed.

    All files are written under temporary names and then renamed. Raises CheckpointMismatch for
    state that is not a tensor or of a type that safetensors cannot hold and for thresholds that are
    no finite numbers, InvalidRecipe for a recipe that TOML cannot hold (a metric), and OSError.
    """
    folder = Path(folder)
    entries, aliases = _describe(model, folder, masks_only)
    tensors = _pack_all(model, entries, folder)
    metadata = {"format": "pt", KEY: Layout(entries, aliases, masks_only).to_json()}
    metadata |= _thresholds(model, folder)
    with ExitStack() as stack:
        weights_file = stack.enter_context(replacing(folder / WEIGHTS_FILE))
        annotations_file = stack.enter_context(replacing(folder / ANNOTATIONS_FILE))
        if recipe is not None:
            recipe.to_toml(stack.enter_context(replacing(folder / RECIPE_FILE)))
        Recipe(weights=annotations(model)).to_toml(annotations_file)
        save_file(tensors, weights_file, metadata=metadata)
        # safetensors makes a file that its owner alone may read; the rest of the folder is not.
        weights_file.chmod(annotations_file.stat().st_mode)
    if recipe is None:
        (folder / RECIPE_FILE).unlink(missing_ok=True)


def _thresholds(model: nn.Module, folder: Path) -> dict[str, str]:
    """The metadata entry of the attention thresholds, none where nothing was calibrated."""
    found = attention_thresholds(model)
    try:
        return {THRESHOLDS_KEY: thresholds_to_json(found)} if found else {}
    except BadLayout as error:
        remedy = "Calibrate the attentions again"
        raise CheckpointMismatch(path=folder, rule=str(error), remedy=remedy) from error


def _describe(
    model: nn.Module, folder: Path, masks_only: bool
) -> tuple[dict[str, Entry], dict[str, str]]:
    """The entry of each distinct tensor, and the other names of tied ones."""
    entries: dict[str, Entry] = {}
    aliases: dict[str, str] = {}
    first_name: dict[int, str] = {}
    annotated = annotations(model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        _check_storable(folder, name, tensor)
        first = first_name.setdefault(id(tensor), name)
        if first != name:
            aliases[name] = first
        elif not masks_only:
            entries[name] = _smallest(tensor.detach(), annotated.get(name))
        elif _is_pruned(tensor.detach(), name in annotated):
            entries[name] = Entry("keep", tuple(tensor.shape), tensor.dtype, tensor.dim() - 1)
    return entries, {alias: name for alias, name in aliases.items() if name in entries}


def _check_storable(folder: Path, name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in STORED_NAMES or tensor.is_meta:
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise CheckpointMismatch(
            path=folder,
            rule=f"state {name} is of type {kind} or has no data",
            remedy="Only dense tensors can be stored without pickle; remove it from state_dict()",
        )


def _smallest(tensor: Tensor, hint: Pattern | None) -> Entry:
    """The entry of fewest bytes; among equals N:M, then bitmap, then dense.

    hint: what was decided for the tensor, whose codes are looked for.
    """
    shape, dtype = tuple(tensor.shape), tensor.dtype
    dense = Entry("dense", shape, dtype)
    if dtype not in PACKABLE or not shape or not tensor.numel():
        return dense
    nonzeros = int(torch.count_nonzero(tensor))
    if nonzeros > (1 - MINIMUM_SPARSITY) * tensor.numel():
        return dense
    axes = range(len(shape) - 1, -1, -1)  # among equals the last axis: rows of a linear's weight
    candidates = [entry for axis in axes for entry in _nm_entries(tensor, axis)]
    candidates += [Entry("bitmap", shape, dtype, axis) for axis in axes]
    found = {axis: coded(tensor, axis, hint) for axis in axes}
    candidates += [
        replace(entry, values=codes[0], tile=codes[1])
        for entry in candidates
        if (codes := found[entry.axis]) is not None
    ]
    return min((*candidates, dense), key=lambda entry: _bytes(entry, nonzeros))


def _nm_entries(tensor: Tensor, axis: int) -> list[Entry]:
    count = count_zeros(as_matrix(tensor, axis))
    return [
        Entry("nm", tuple(tensor.shape), tensor.dtype, axis, max(1, n), m)
        for m, n in count.fullest.items()
        if n < m
    ]


def _bytes(entry: Entry, nonzeros: int) -> int:
    """Of all its parts; `nonzeros` is what a bitmap stores."""
    free = -(-nonzeros // 2) if entry.values == "int4" else nonzeros
    return sum(
        dtype.itemsize * prod(free if size is None else size for size in shape)
        for dtype, shape in entry.parts().values()
    )


def _is_pruned(tensor: Tensor, annotated: bool) -> bool:
    if tensor.dtype not in PACKABLE or tensor.dim() < 2 or not tensor.numel():
        return False
    nonzeros = int(torch.count_nonzero(tensor))
    return annotated or nonzeros <= (1 - MINIMUM_SPARSITY) * tensor.numel()


def _pack_all(model: nn.Module, entries: Mapping[str, Entry], folder: Path) -> dict[str, Tensor]:
    state = model.state_dict(keep_vars=True)
    packed: dict[str, Tensor] = {}
    for name, entry in entries.items():
        for suffix, tensor in _pack(state[name].detach(), entry).items():
            if name + suffix in packed:
                raise CheckpointMismatch(
                    path=folder,
                    rule=f"two tensors would be stored as {name + suffix}",
                    remedy="Rename a parameter so that its name does not end in a layout suffix",
                )
            packed[name + suffix] = tensor.cpu()
    return packed


def _pack(tensor: Tensor, entry: Entry) -> dict[str, Tensor]:
    if entry.kind == "dense":
        # A copy, because safetensors refuses tensors that share storage with others.
        return {"": tensor.clone(memory_format=torch.contiguous_format)}
    matrix = as_matrix(tensor, entry.axis)
    if entry.kind == "keep":
        return {":keep": pack_bits(matrix != 0)}
    if not entry.values:
        return _packed(matrix, entry)
    codes, scales = pack_codes(matrix, entry)
    parts = _packed(codes, entry)
    return {**parts, ":values": stored_codes(parts[":values"], entry), ":scales": scales}


def _packed(matrix: Tensor, entry: Entry) -> dict[str, Tensor]:
    if entry.kind == "nm":
        nm = pack_nm(matrix, entry.n, entry.m)
        return {":values": nm.values, ":index": nm.index}
    bitmap = pack_bitmap(matrix)
    return {":values": bitmap.values, ":bits": bitmap.bits}
