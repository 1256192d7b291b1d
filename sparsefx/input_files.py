"""Inputs of a model as .safetensors files: the arguments of one call, or batches for calibration.

A file of batches names its tensors "<argument>.<number>", from 0 on, each of any shape that the
model takes, or stacks the batches of an argument along a leading axis:

    input_ids.0 [1, 2048]   input_ids.1 [1, 1900]   ...      or      input_ids [batches, 1, 2048]
"""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from sparsefx.errors import UnreadableInput, UnreadableModel
from sparsefx.model_files import load_tensors

_NUMBERED = re.compile(r"(.+)\.(0|[1-9][0-9]{0,8})")
_STACKED_DIMS = 3  # [batches, batch, length] is the smallest stack that can be told from a batch
_FORM = "Name its tensors input_ids.0, input_ids.1, ... or store input_ids [batches, batch, length]"


def load_call(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """The arguments of one call, by name, with which `model` was called once to see that it works.

    Raises UnreadableInput.
    """
    inputs = _load(path, "It must hold the arguments of one call by name, such as input_ids")
    check_call(path, model, inputs)
    return inputs


def load_batches(path: Path) -> list[dict[str, Tensor]]:
    """Batches by number, each a dict of arguments by name. Raises UnreadableInput."""
    arguments: dict[str, dict[int, Tensor]] = {}
    for name, tensor in _load(path, _FORM).items():
        numbered = _NUMBERED.fullmatch(name)
        if numbered:
            argument, found = numbered[1], {int(numbered[2]): tensor}
        elif tensor.dim() >= _STACKED_DIMS:
            argument, found = name, dict(enumerate(tensor))
        else:
            shape = tuple(tensor.shape)
            raise _unreadable(path, f"{name} of shape {shape} is no stack of batches", _FORM)
        if arguments.setdefault(argument, {}).keys() & found.keys():
            raise _unreadable(path, f"a batch of {argument} is there twice", _FORM)
        arguments[argument] |= found
    counts = {len(found) for found in arguments.values()}
    if len(counts) != 1 or 0 in counts:
        rule = "it holds no batch, or other numbers of batches for one argument than for another"
        raise _unreadable(path, rule, _FORM)
    (count,) = counts
    for argument, found in arguments.items():
        if set(found) != set(range(count)):
            rule = f"the batches of {argument} are not numbered from 0 to {count - 1}"
            raise _unreadable(path, rule, _FORM)
    return [{name: found[at] for name, found in arguments.items()} for at in range(count)]


def check_call(path: Path, model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Calls the model once: after compilation an error would say less. Raises UnreadableInput."""
    try:
        model(**inputs)
    except Exception as error:  # whatever a model raises on arguments that it does not take
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        rule = f"the model does not take its tensors as arguments: {type(error).__name__}: {reason}"
        remedy = "It must hold the arguments of one call by name, such as input_ids"
        raise _unreadable(path, rule, remedy) from error


def _load(path: Path, remedy: str) -> dict[str, Tensor]:
    try:
        return load_tensors(path)
    except UnreadableModel as error:
        raise _unreadable(path, str(error.fields["rule"]), remedy) from error


def _unreadable(path: Path, rule: str, remedy: str) -> UnreadableInput:
    return UnreadableInput(path=path, rule=rule, remedy=remedy)
