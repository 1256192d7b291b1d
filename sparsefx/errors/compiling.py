"""What cannot be compiled, built, run or exported."""

from sparsefx.errors.base import SparseFXError


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


class NotCapturable(SparseFXError, RuntimeError):
    """A model that torch.export cannot capture with a calibration batch."""

    message = (
        "torch.export cannot capture {model} with calibration batch {batch} (from 0): {rule}. "
        "Call the model with that batch first; if it runs, its control flow depends on the data"
    )


class WeightIsPacked(SparseFXError, RuntimeError):
    """A change of a weight of which only the packed form is kept."""

    message = (
        "the layer keeps its weight packed (memory='small'): {what}; change the original model and "
        "compile it again, or pass memory='fast'"
    )
