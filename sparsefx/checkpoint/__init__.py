"""Sparse checkpoints: packed weights as safetensors, recipe and annotations as TOML beside them.

    folder/model.safetensors    packed weights; their layout, and the thresholds of attentions, as
                                JSON in the file's metadata
    folder/annotations.toml     parameter name -> pattern decided for it
    folder/recipe.toml          what was asked for, where `save` was told

Nothing is ever unpickled.
"""

from sparsefx.checkpoint.reader import load
from sparsefx.checkpoint.writer import save

__all__ = ["load", "save"]
