"""Data that does not suffice, and what was found from it."""

from sparsefx.errors.base import SparseFXError
from sparsefx.errors.pruning import NothingMatches


class EmptyCalibration(SparseFXError, ValueError):
    """Calibration data was passed and holds no batch."""

    message = "calibration holds no batch; pass at least one batch of model inputs, or None"


class InvalidThreshold(SparseFXError, ValueError):
    """A request for sparse attention whose own numbers make no sense."""

    message = (
        "{what} is not valid: {rule}. "
        "Write SkipSoftmax(sparsity=0.5), SkipSoftmax(error=0.01) or Theta(k=64)"
    )


class ShortCalibration(SparseFXError, ValueError):
    """Calibration data too short to tell one threshold from another."""

    message = (
        "the longest calibration input of {name} has {keys} keys and a tile has {tile}: "
        "thresholds need at least {least} tiles; pass longer inputs or a smaller tile"
    )


class HeadsMismatch(SparseFXError, ValueError):
    """Stored thresholds that belong to another attention."""

    message = (
        "the thresholds of {name} are for {stored} heads and it has {heads}: "
        "they belong to another model; calibrate this one"
    )


class MissingCalibration(SparseFXError, ValueError):
    """Something was asked for that is found on data, and there are none."""

    message = (
        "{what} is found on data: pass calibration=, batches of inputs of the model, or ask for "
        "something that needs none, such as Magnitude, or SkipSoftmax(scale_factor=...)"
    )


class AttentionNotFound(NothingMatches):
    """A recipe key (glob) on attention that matches none that calibration saw."""

    message = (
        "recipe key {key!r} matches no attention of {model} that thresholds may be laid on; "
        "those are, for example: {examples}. Correct the glob or remove the key. Attention inside "
        "one operator, or in a layer that breaks Dynamo's graph, is not among them, nor is "
        "cross-attention: `explain` of the model compiled without a recipe lists each with a reason"
    )


class NonFiniteAttention(SparseFXError, ValueError):
    """Calibration data on which an attention gives NaN or infinity."""

    message = (
        "attention {name} has NaN or infinite scores or values on calibration batch {batch}: "
        "look for bad weights (sparsefx.compile names them) or bad inputs"
    )


class ForeignCalibration(SparseFXError, ValueError):
    """A state file of calibration that does not belong to this calibration."""

    message = "state {path}: {rule}. Pass another path, or delete the file to start over"


class MissingStatistics(MissingCalibration):
    """A criterion that is decided from data was asked for without the data."""

    message = (
        "{what} is decided from a layer's inputs and has no {missing} of them: "
        "pass calibration=, batches of inputs of the model, to sparsefx.sparsify"
    )


class NonFiniteStatistics(SparseFXError, ValueError):
    """Statistics of a layer's input that are NaN or infinite."""

    message = (
        "the {statistic} of the inputs of {name} are NaN or infinite: "
        "look for bad weights in the layers before it, or bad calibration inputs"
    )


class NonFiniteActivation(SparseFXError, ValueError):
    """Calibration data on which a layer's input has NaN or infinite values."""

    message = (
        "the input of {name} has NaN or infinite values on calibration batch {batch} (from 0): "
        "look for bad weights in the layers before it, or bad inputs"
    )


class UnobservedLayer(SparseFXError, ValueError):
    """Layers whose statistics were asked for and that no calibration batch runs."""

    message = (
        "no calibration batch runs {names} as a linear, a 2-d convolution or a grouped product of "
        "experts, so nothing is known of their inputs; exclude them (a glob that maps to None), or "
        "pass batches that reach them"
    )


class PeerFailed(SparseFXError, RuntimeError):
    """Another process of a distributed calibration failed, or is doing something else."""

    message = (
        "{rule}: all processes need the same model, recipe and options, and at least one batch "
        "each; look at the first error of the other processes"
    )


class UnseenLayer(UnobservedLayer):
    """A layer that calibration batches run, but never on a row that counts."""

    message = (
        "no calibration batch has a row that counts for {name}: its inputs are empty, or "
        "attention_mask masks all of them; pass batches with tokens to learn from"
    )


class TooFewValues(EmptyCalibration):
    """A batch on which a batch norm sees no two values of a channel, whose variance it needs."""

    message = (
        "batch norm {name} sees {values} value(s) per channel on calibration batch {batch} (from "
        "0), and a variance needs two; pass batches of more samples"
    )
