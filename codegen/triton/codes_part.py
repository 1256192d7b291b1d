"""How kernels read values that may be codes of a quantised weight; printed into their modules.

KIND is "" (numbers of x's type), "int8", "int4" or "fp8" (e4m3; both of the latter as bytes). A
weight is code * scale, computed in float32 and rounded once to x's type.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl


@triton.jit
def numbers(codes, scale, KIND: tl.constexpr, dtype: tl.constexpr):
    """The weights of int8 `codes` (int4 ones already apart) with a `scale` that broadcasts."""
    if KIND == "fp8":  # the bits of an e4m3 number, at the place of a float16's, are it / 2^8
        wide = codes.to(tl.int16)
        bits = (wide & -32768) | ((wide & 0x7F) << 7)
        number = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        number = codes.to(tl.float32)
    return (number * scale.to(tl.float32)).to(dtype)


@triton.jit
def nibble(byte, place):
    """The signed nibble `place` (0: low) of each byte, as int8."""
    return (((byte.to(tl.int32) >> (4 * place)) & 15 ^ 8) - 8).to(tl.int8)
