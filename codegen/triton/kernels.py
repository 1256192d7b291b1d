"""The kernels of the CUDA target: which packed linears they accept and how they are called."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsefx.codegen.triton import emit, hardware, library
from sparsefx.codegen.triton.form import Form
from sparsefx.codegen.triton.forms import FORMS
from sparsefx.codegen.triton.variant import DTYPES, Settings, Variant
from sparsefx.epilogue import features
from sparsefx.formats import NM_GROUPS
from sparsefx.target import Kernel, LinearSpec, Lowering


@dataclass(frozen=True)
class TritonLinear:
    """A generated Triton kernel of one form (`forms.FORMS`), run with `settings`.

    () takes the form's best guess for the linear at hand.
    """

    form: str
    settings: Settings = ()

    @property
    def name(self) -> str:
        """Shown in reports; stable."""
        return f"triton_{self.form}_linear"

    @property
    def layout(self) -> str:
        """The storage it reads: "nm", "bitmap" or "block"."""
        return self._form.layout

    def accepts(self, spec: LinearSpec) -> str | None:
        """None for yes, or the reason for no."""
        if spec.layout != self.layout:
            return f"the weight is stored as {spec.layout}, this kernel reads {self.layout}"
        if not library.installed():
            return "Triton is not installed"
        if spec.dtype not in DTYPES.values():
            return f"the kernel computes {', '.join(DTYPES)}, not {spec.dtype}"
        if not spec.out_features or not spec.in_features:
            return "the weight is empty"
        return (
            _unlike_nm(spec)
            or self._form.misfit(spec)
            or hardware.lacks(self._form.needs)
            or _unprintable(self.form, spec)
        )

    def lower(self, spec: LinearSpec, packed: tuple[Tensor, ...]) -> Lowering:
        """Prints the kernel into the cache folder; Triton compiles it at the first launch.

        What the kernel does not read as it is stored (`sparsefx.formats`) is re-arranged here.
        """
        settings = self.settings or self._form.tunings(spec)[0]
        variant = Variant.of(self.form, spec, settings)
        path, text = emit.write(variant, self._form)
        stored = self._form.arrange(variant, packed, spec.in_features)
        return Lowering(
            op=torch.ops.sparsefx_triton.linear.default,
            packed=stored,
            handle=variant.handle,
            features=features(spec.out_features, spec.epilogue),
            text=text,
            path=str(path),
        )

    def tunings(self, spec: LinearSpec) -> tuple[Kernel, ...]:
        """The ways to run it that are worth timing, best guess first, at most 8."""
        return tuple(replace(self, settings=each) for each in self._form.tunings(spec))

    @property
    def _form(self) -> Form:
        return FORMS[self.form]


def kernels() -> tuple[Kernel, ...]:
    """The Triton kernels, in order of preference."""
    return tuple(TritonLinear(name) for name in FORMS)


def _unlike_nm(spec: LinearSpec) -> str | None:
    """Why this is no N:M linear at all, or None."""
    if spec.layout != "nm":
        return None
    if spec.m not in NM_GROUPS or not 0 < spec.n < spec.m:
        return f"{spec.n}:{spec.m} is not n:m with 0 < n < m and m in {NM_GROUPS}"
    if spec.in_features % spec.m:
        return f"{spec.in_features} input features are not a multiple of m={spec.m}"
    return None


def _unprintable(form: str, spec: LinearSpec) -> str | None:
    try:
        Variant.of(form, spec)
    except ValueError as error:
        return str(error)
    return None
