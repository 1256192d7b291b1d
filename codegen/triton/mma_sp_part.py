"""The inline PTX of the mma.sp template for 2:4 bfloat16; emit prints the variant's instead."""

import triton.language as tl

from sparsefx.codegen.triton import mma_sp_asm

_PROGRAM = mma_sp_asm.Program("bf16")
MULTIPLY = tl.constexpr(mma_sp_asm.multiply(_PROGRAM))
MULTIPLY_OPERANDS = tl.constexpr(mma_sp_asm.constraints(_PROGRAM))
EXCHANGE = tl.constexpr(mma_sp_asm.exchange(is_single=False))
EXCHANGE_OPERANDS = tl.constexpr(mma_sp_asm.EXCHANGE_CONSTRAINTS)
