"""Every error class of SparseFX; each message names the thing, the rule and the remedy."""


class SparseFXError(Exception):
    """Base of all errors that SparseFX raises on purpose.

    Subclasses set `message`, a format string; its fields are the keyword arguments of the
    constructor and stay readable on the instance (`error.fields["name"]`).
    """

    message = "{detail}"

    def __init__(self, **fields: object) -> None:
        self.fields = fields
        super().__init__(self.message.format(**fields))


class UnknownTarget(SparseFXError, ValueError):
    """A target name that is not in the table of targets."""

    message = (
        "no target is named {name!r}; there are: {known}. Pass one of them, or a sparsefx.Target"
    )


class TargetUnavailable(SparseFXError, RuntimeError):
    """The device of a target is not present and the guard was told to measure on it."""

    message = (
        "target {name!r} needs a {device} device and this process sees none, so guard='measure' "
        "has nothing to measure; pass guard='model' to plan by the roofline, or another target"
    )


class DeviceMismatch(SparseFXError, ValueError):
    """The model lives on another device than the target."""

    message = (
        "the model is on {model_device} but target {name!r} runs on {device}; "
        "move it with model.to({device!r}) or pass target={suggestion!r}"
    )


class UnknownOption(SparseFXError, ValueError):
    """A value outside a closed set of choices."""

    message = "{option}={value!r} is not a choice; there are: {known}"


class InvalidPattern(SparseFXError, ValueError):
    """A sparsity pattern whose own numbers make no sense."""

    message = "{pattern} is not a sparsity pattern: {rule}. {remedy}"


class PatternDoesNotFit(SparseFXError, ValueError):
    """A pattern was asked for on a weight whose shape it cannot divide."""

    message = (
        "{pattern} does not fit {name} of shape {shape}: {rule}. "
        "Exclude the weight (a glob that maps to None) or choose another pattern"
    )


class NothingMatches(SparseFXError, ValueError):
    """A recipe key (glob) that matches no prunable parameter."""

    message = (
        "recipe key {key!r} matches no weight of {model}; prunable weights are, for example: "
        "{examples}. Correct the glob or remove the key"
    )


class InvalidRecipe(SparseFXError, ValueError):
    """A recipe, or a recipe file, that cannot be understood."""

    message = "recipe {where}: {rule}. {remedy}"


class NonFiniteWeight(SparseFXError, ValueError):
    """A weight that contains NaN or infinity."""

    message = (
        "weight {name} has {count} NaN or infinite values, whose magnitude cannot be ranked; "
        "repair or reload the checkpoint before pruning or compiling it"
    )


class EmptyCalibration(SparseFXError, ValueError):
    """Calibration data was passed and holds no batch."""

    message = "calibration holds no batch; pass at least one batch of model inputs, or None"


class ShapeMismatch(SparseFXError, ValueError):
    """A tensor does not have the shape that an operation needs."""

    message = "{name} has shape {shape}, but {rule}. {remedy}"


class NotCompiled(SparseFXError, TypeError):
    """explain() was given something that SparseFX did not compile."""

    message = "{what} was not compiled by SparseFX; pass the result of sparsefx.compile(model)"


class InvalidGraph(SparseFXError, AssertionError):
    """A pass left a graph that its stage does not allow: a bug in that pass."""

    message = (
        "after pass {after!r} the graph is not valid at stage {stage!r}: {rule}. "
        "Pass developer: correct the pass; user: leave it out with SPARSEFX_SKIP={after}"
    )


class CorruptCheckpoint(SparseFXError, ValueError):
    """A sparse checkpoint that does not describe valid packed weights."""

    message = "checkpoint {path}: {rule}. The file is damaged or hostile; nothing was loaded"


class CheckpointMismatch(SparseFXError, ValueError):
    """A valid sparse checkpoint that belongs to another model."""

    message = "checkpoint {path} does not fit the model: {rule}. {remedy}"


class ExportFailed(SparseFXError, RuntimeError):
    """An ONNX export whose check failed; no file is left behind."""

    message = "export to {path} failed: {rule}. No file was written. {remedy}"


class KernelBuildFailed(SparseFXError, RuntimeError):
    """A generated kernel that the system's compiler refused."""

    message = (
        "kernel {kernel} did not compile: {rule}. The node stays dense; please report the text"
    )


class KernelRunFailed(KernelBuildFailed):
    """A generated kernel that was built and failed when the guard ran it."""

    message = "kernel {kernel} failed when it ran: {rule}. The node stays dense; please report it"


class InvalidSetting(SparseFXError, ValueError):
    """An environment variable of SparseFX with a value outside its list."""

    message = "{variable}={value!r} is not understood; legal values: {known}"


class InvalidReport(SparseFXError, ValueError):
    """A JSON report that cannot be read."""

    message = "report {path}: {rule}. Write it again with to_json"


class UnreadableModel(SparseFXError, ValueError):
    """A path given to the shell command that holds no model it can read."""

    message = "{path} cannot be read as a model: {rule}. {remedy}"


class UnreadableInput(SparseFXError, ValueError):
    """A file of inputs, given to the shell command, that the model cannot be called with."""

    message = "{path} cannot be read as the model's inputs: {rule}. {remedy}"


class MissingPackage(SparseFXError, ImportError):
    """A package that only some features need is not installed."""

    message = "{feature} needs the package {package!r}; install it with: {remedy}"


class DtypeMismatch(SparseFXError, TypeError):
    """A tensor does not have the dtype that a built kernel was made for."""

    message = "{name} is {dtype}, but the kernel was built for {needed}; cast it, or compile again"


class KernelNotFound(SparseFXError, RuntimeError):
    """A graph names a built kernel that is not in the cache of this machine."""

    message = (
        "kernel {handle!r} is not in the cache folder (SPARSEFX_CACHE) of this machine; "
        "compile the model again, which builds it"
    )


class InvalidHandle(SparseFXError, ValueError):
    """A kernel handle in a graph that SparseFX cannot have written."""

    message = "{handle!r} does not name a kernel: {rule}. Compile the model again"


class NotExportable(SparseFXError, ValueError):
    """A graph, or an option, that ONNX export refuses before it writes anything."""

    message = "the model cannot be exported to ONNX: {rule}. {remedy}"


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


class InvalidAllocation(SparseFXError, ValueError):
    """A way to spread a budget over layers whose own numbers make no sense."""

    message = "{what} is no way to spread a budget over layers: {rule}. {remedy}"


class ImpossibleBudget(SparseFXError, ValueError):
    """A budget that no choice for the layers can meet."""

    message = "the budget cannot be met: {rule}. {remedy}"


class NonFiniteLoss(SparseFXError, ValueError):
    """A loss, asked for a layer's importance, that is NaN or infinite."""

    message = (
        "the loss is {loss} on batch {batch} with {name} perturbed by {epsilon}: look for bad "
        "inputs, or pass a smaller epsilon. The model is unchanged"
    )


class InvalidCriterion(SparseFXError, ValueError):
    """A pruning criterion whose own numbers make no sense."""

    message = "{criterion} is not a valid criterion: {rule}. Its defaults are a good start"


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


class SingularHessian(SparseFXError, ArithmeticError):
    """A Hessian X^T X that cannot be factorised, whatever the damping that was tried."""

    message = (
        "X^T X of the inputs of {name} has no Cholesky factor, even with {damp:g} times its mean "
        "diagonal added; pass more calibration data, or a larger damp"
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


class NotCapturable(SparseFXError, RuntimeError):
    """A model that torch.export cannot capture with a calibration batch."""

    message = (
        "torch.export cannot capture {model} with calibration batch {batch} (from 0): {rule}. "
        "Call the model with that batch first; if it runs, its control flow depends on the data"
    )


class PeerFailed(SparseFXError, RuntimeError):
    """Another process of a distributed calibration failed, or is doing something else."""

    message = (
        "{rule}: all processes need the same model, recipe and options, and at least one batch "
        "each; look at the first error of the other processes"
    )


class InvalidOrder(SparseFXError, ValueError):
    """An order of channels that would change what the model computes."""

    message = (
        "the order is not one of the {channels} channels that {name} reads, or moves some out of "
        "the block in which they may change places; pass the order found for this very coupling"
    )


class NonFiniteMetric(SparseFXError, ValueError):
    """A metric that gives no number for the dense model, with which others are compared."""

    message = (
        "the metric of the dense {model} is {value}: it must be a finite number, lower for a "
        "better model; look for bad inputs or bad weights"
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


class NoGradient(SparseFXError, RuntimeError):
    """A model whose loss cannot be differentiated with respect to its layers' outputs."""

    message = (
        "the loss has no gradient at the outputs of the layers: {rule}; "
        'pass Knapsack(objective="error"), which needs none'
    )
