"""Bad files and settings: checkpoints, reports, models, inputs."""

from sparsefx.errors.base import SparseFXError


class CorruptCheckpoint(SparseFXError, ValueError):
    """A sparse checkpoint that does not describe valid packed weights."""

    message = "checkpoint {path}: {rule}. The file is damaged or hostile; nothing was loaded"


class CheckpointMismatch(SparseFXError, ValueError):
    """A valid sparse checkpoint that belongs to another model."""

    message = "checkpoint {path} does not fit the model: {rule}. {remedy}"


class InvalidSetting(SparseFXError, ValueError):
    """An environment variable of SparseFX with a value outside its list."""

    message = "{variable}={value!r} is not understood; legal values: {known}"


class InvalidReport(SparseFXError, ValueError):
    """A JSON report that cannot be read."""

    message = "report {path}: {rule}. Write it again with to_json"


class InvalidTuning(SparseFXError, ValueError):
    """A file of tuning results that cannot be read."""

    message = (
        "tuning results {path}: {rule}. The file is damaged or hostile; write it again with "
        "sparsefx bench --save"
    )


class UnreadableModel(SparseFXError, ValueError):
    """A path given to the shell command that holds no model it can read."""

    message = "{path} cannot be read as a model: {rule}. {remedy}"


class UnreadableInput(SparseFXError, ValueError):
    """A file of inputs, given to the shell command, that the model cannot be called with."""

    message = "{path} cannot be read as the model's inputs: {rule}. {remedy}"


class MissingPackage(SparseFXError, ImportError):
    """A package that only some features need is not installed."""

    message = "{feature} needs the package {package!r}; install it with: {remedy}"
