"""Annotations: which pattern was decided for which parameter, kept on the model itself.

They are one plain attribute of the root module: `copy.deepcopy` carries them along, `state_dict()`
does not see them, and `sparsefx.checkpoint` writes them beside the weights.
"""

from collections.abc import Mapping

from torch import nn

from sparsefx.spec import Pattern

_ATTRIBUTE = "_sparsefx_annotations"


def annotations(model: nn.Module) -> dict[str, Pattern]:
    """Parameter name -> pattern decided for it; a copy, empty where nothing was decided."""
    return dict(getattr(model, _ATTRIBUTE, {}))


def annotate(model: nn.Module, patterns: Mapping[str, Pattern]) -> None:
    """Adds `patterns` (parameter name -> pattern) to the model's annotations; later ones win."""
    setattr(model, _ATTRIBUTE, {**annotations(model), **patterns})
