"""Annotations: what was decided about a model, kept on the model itself.

The pattern of each parameter, by parameter name, the thresholds of each attention, by module name,
and the line of the pruning's report on each weight. They are plain attributes of the root module:
`copy.deepcopy` carries them along, `state_dict()` does not see them, and `sparsefx.checkpoint`
writes all but the report's lines beside the weights.
"""

from collections.abc import Mapping

from torch import nn

from sparsefx.attention.thresholds import AttentionThresholds
from sparsefx.prune.report.layers import PrunedLayer
from sparsefx.spec import Pattern

_PATTERNS = "_sparsefx_annotations"
_THRESHOLDS = "_sparsefx_attention"
_PRUNING = "_sparsefx_pruning"


def annotations(model: nn.Module) -> dict[str, Pattern]:
    """Parameter name -> pattern decided for it; a copy, empty where nothing was decided."""
    return dict(getattr(model, _PATTERNS, {}))


def annotate(model: nn.Module, patterns: Mapping[str, Pattern]) -> None:
    """Adds `patterns` (parameter name -> pattern) to the model's annotations; later ones win."""
    setattr(model, _PATTERNS, {**annotations(model), **patterns})


def attention_thresholds(model: nn.Module) -> dict[str, AttentionThresholds]:
    """Attention name (`attention.sites.attention_names`) -> its thresholds; a copy."""
    return dict(getattr(model, _THRESHOLDS, {}))


def annotate_attention(model: nn.Module, found: Mapping[str, AttentionThresholds]) -> None:
    """Adds thresholds of attentions to the model's annotations; later ones win."""
    replace_attention(model, {**attention_thresholds(model), **found})


def replace_attention(model: nn.Module, found: Mapping[str, AttentionThresholds]) -> None:
    """Makes `found` all that the model's annotations say of attention."""
    setattr(model, _THRESHOLDS, dict(found))


def pruned_layers(model: nn.Module) -> dict[str, PrunedLayer]:
    """Parameter name -> what pruning did to it; a copy, empty for a model that was not pruned."""
    return dict(getattr(model, _PRUNING, {}))


def annotate_pruning(model: nn.Module, layers: Mapping[str, PrunedLayer]) -> None:
    """Adds lines of a pruning's report to the model's annotations; later ones win."""
    setattr(model, _PRUNING, {**pruned_layers(model), **layers})
