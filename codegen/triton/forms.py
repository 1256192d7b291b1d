"""The forms of linear kernels, in order of preference, and the handles that name them."""

import functools

from sparsefx.codegen.triton.bitmap_form import BitmapForm
from sparsefx.codegen.triton.block_form import BlockForm
from sparsefx.codegen.triton.form import Form
from sparsefx.codegen.triton.mma_sp_form import MmaSpForm
from sparsefx.codegen.triton.nm_form import NMForm
from sparsefx.codegen.triton.parity_form import ParityForm
from sparsefx.codegen.triton.places_form import PlacesForm
from sparsefx.codegen.triton.variant import Variant
from sparsefx.errors import InvalidHandle

FORMS: dict[str, Form] = {
    form.name: form
    for form in (MmaSpForm(), ParityForm(), NMForm(), PlacesForm(), BitmapForm(), BlockForm())
}


@functools.cache
def parse(handle: str) -> tuple[Variant, Form]:
    """What `handle` names. Raises InvalidHandle."""
    variant = Variant.parse(handle)
    form = FORMS.get(variant.form)
    if form is None:
        raise InvalidHandle(handle=handle, rule=f"no kernel is called {variant.form!r}")
    if (form.layout == "nm") != (variant.m > 0) or (form.layout == "block") != (
        variant.block > (0, 0)
    ):
        raise InvalidHandle(handle=handle, rule=f"{variant.form} has another pattern")
    for name, value in variant.settings:
        if value not in form.settings.get(name, ()):
            raise InvalidHandle(handle=handle, rule=f"{name}={value} is not one of its settings")
    return variant, form
