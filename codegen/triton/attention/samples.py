"""The launches of each attention kernel on tensors that are not there, to compile them for a GPU.

One line of SAMPLES a template: what plans its launches for a Sample.
"""

from collections.abc import Callable

from sparsefx.codegen.triton.attention import decode_skip, prefill, theta_decode
from sparsefx.codegen.triton.attention.launch import Loaded, Sample
from sparsefx.codegen.triton.form import Call

SAMPLES: dict[str, Callable[[Loaded, Sample], tuple[Call, ...]]] = {
    "decode_skip": decode_skip.sample,
    "theta_decode": theta_decode.sample,
    "skip_prefill": prefill.skip_sample,
    "block": prefill.block_sample,
}
