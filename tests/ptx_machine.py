"""Runs inline PTX in Triton's CPU interpreter, for tests: a machine of whole warps.

It knows just the instructions that the kernels print, each as the PTX ISA 9 defines it. mma.sp is
written from the ISA's definition of its fragments and metadata, not from our packer, so that a
wrong order of either shows: "Matrix fragments for sparse mma.m16n8k32 with .f16 and .bf16 types".
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import numpy as np
import numpy.typing as npt
import triton.language as tl
from triton.runtime import interpreter

from tests.interp_bf16 import narrow, widen

Words = npt.NDArray[np.uint32]  # [warps, 32 lanes]
_LINE = re.compile(r"([a-z0-9_.:]+)\s+(.*);")
_LANE = np.arange(32)
_MASK = np.uint32(0xFFFFFFFF)


@contextmanager
def running() -> Iterator[None]:
    """Within it, interpreted kernels run their inline PTX."""
    with mock.patch.object(interpreter.InterpreterBuilder, "create_inline_asm", _inline_asm):
        yield


class _Result:
    """What the frontend takes an operation's results from."""

    def __init__(self, handle: interpreter.TensorHandle) -> None:
        self._handle = handle

    def get_result(self, index: int) -> interpreter.TensorHandle:
        assert index == 0
        return self._handle


def _inline_asm(
    self: interpreter.InterpreterBuilder,
    asm: str,
    constraints: str,
    values: Sequence[interpreter.TensorHandle],
    types: Sequence[tl.dtype],
    is_pure: bool,
    pack: int,
) -> _Result:
    """Four neighbours are a thread's registers: operand i is $(4 + 4 i) .., results $0 .. $3."""
    assert pack == 4 and constraints.count(",") + 1 == 4 * (1 + len(values))
    shape = values[0].data.shape
    registers: dict[str, Words] = {}
    for operand, value in enumerate(values):
        assert value.data.dtype.itemsize == 4 and value.data.shape == shape
        lanes = np.ascontiguousarray(value.data).view(np.uint32).reshape(-1, 32, 4)
        registers |= {f"${4 + 4 * operand + i}": lanes[..., i] for i in range(4)}
    result = run(asm, registers)
    words = np.stack([result[f"${i}"] for i in range(4)], -1).reshape(shape)
    scalar = types[0].scalar
    data = words.view(np.float32) if scalar == tl.float32 else words.view(np.int32)
    return _Result(interpreter.TensorHandle(data, scalar))


def run(asm: str, registers: dict[str, Words]) -> dict[str, Words]:
    """The registers after all lines; a read before a write raises KeyError."""
    registers = dict(registers)
    for line in filter(None, (each.strip() for each in asm.splitlines())):
        if line in "{}" or line.startswith(".reg"):
            continue
        found = _LINE.fullmatch(line)
        assert found is not None, line
        name, *types = found[1].split(".")
        operands = re.findall(r"\{[^}]*\}|[^\s,{}]+", found[2])
        _OPERATIONS[name](registers, types, operands)
    return registers


def _read(registers: dict[str, Words], name: str) -> Words:
    shape = next(iter(registers.values())).shape
    if name == "%laneid":
        return np.broadcast_to(_LANE.astype(np.uint32), shape)
    if name[0].isdigit():
        return np.full(shape, int(name, 0), np.uint32)
    return registers[name]


def _binary(function: Callable[[Words, Words], Words]) -> Callable[..., None]:
    def execute(registers: dict[str, Words], types: list[str], operands: list[str]) -> None:
        target, a, b = operands
        registers[target] = function(_read(registers, a), _read(registers, b))

    return execute


def _move(registers: dict[str, Words], types: list[str], operands: list[str]) -> None:
    registers[operands[0]] = _read(registers, operands[1])


def _set_predicate(registers: dict[str, Words], types: list[str], operands: list[str]) -> None:
    assert types == ["eq", "u32"]
    registers[operands[0]] = _read(registers, operands[1]) == _read(registers, operands[2])


def _select(registers: dict[str, Words], types: list[str], operands: list[str]) -> None:
    target, a, b, predicate = operands
    registers[target] = np.where(registers[predicate], _read(registers, a), _read(registers, b))


def _shuffle(registers: dict[str, Words], types: list[str], operands: list[str]) -> None:
    target, source, mask, clamp, members = operands
    assert types == ["sync", "bfly", "b32"] and (clamp, members) == ("0x1f", "0xffffffff")
    registers[target] = _read(registers, source)[:, _LANE ^ int(mask)]


def _permute(registers: dict[str, Words], types: list[str], operands: list[str]) -> None:
    """prmt.b32: each nibble of the selector picks a byte of {b, a}; its bit 3 spreads the sign."""
    target, a, b, selector = operands
    both = [
        (_read(registers, source) >> (8 * byte)) & 0xFF for source in (a, b) for byte in range(4)
    ]
    result = np.zeros_like(both[0])
    for place in range(4):
        nibble = int(selector, 0) >> (4 * place) & 15
        byte = both[nibble & 7]
        if nibble & 8:
            byte = np.where(byte & 0x80, np.uint32(0xFF), np.uint32(0))
        result = result | (byte << np.uint32(8 * place))
    registers[target] = result.astype(np.uint32)


def _fma(registers: dict[str, Words], types: list[str], operands: list[str]) -> None:
    """fma.rn.f16x2, .bf16x2: a b + c of either half, rounded once."""
    assert types[0] == "rn" and not any(name[0].isdigit() for name in operands)
    dtype = types[1].removesuffix("x2")
    a, b, c = (_halves(_read(registers, name), dtype).astype(np.float64) for name in operands[1:])
    registers[operands[0]] = _joined(a * b + c, dtype)


def _halves(words: Words, dtype: str) -> npt.NDArray[np.float32]:
    """[.., 2] numbers of 16 bits: low half first."""
    halves = np.ascontiguousarray(words)[..., None].view(np.uint16)
    return widen(halves) if dtype == "bf16" else halves.view(np.float16).astype(np.float32)


def _joined(numbers: npt.NDArray[np.float64], dtype: str) -> Words:
    if dtype == "bf16":  # products and sums of two bf16 are exact in float64, and so in float32
        bits = narrow(numbers.astype(np.float32))
    else:
        bits = numbers.astype(np.float16).view(np.uint16)
    return np.ascontiguousarray(bits).view(np.uint32)[..., 0]


def _mma_sp(registers: dict[str, Words], types: list[str], operands: list[str]) -> None:
    """mma.sp::ordered_metadata.m16n8k32 with f32 accumulators.

    With g = lane / 4, t = lane % 4: register i of A holds the two nonzeros of four columns of a
    row, row g (i even) or g + 8, columns 4 t .. (i < 2) or 16 + 4 t ..; of B rows 8 i + 2 t, + 1 of
    column g; of C and D row g + 8 (i / 2), column 2 t + i % 2. Metadata: lanes 2 selector and
    2 selector + 1 of each four, for columns 0 .. 15 and 16 .. 31; row g in the lower 16 bits, row
    g + 8 in the upper ones, four bits for four columns: two indices, ascending, the lower first.
    """
    *_, kind = (each for each in types if each in ("f16", "bf16"))
    d, a, b, c, e, selector = operands
    a_words, b_words, c_words = (
        np.stack([_read(registers, name) for name in group.strip("{}").split(", ")], -1)
        for group in (a, b, c)
    )
    metadata, first = _read(registers, e), 2 * int(selector)
    dense_a = _dense_a(_halves(a_words, kind), metadata, first)
    dense_b = np.zeros((len(metadata), 32, 8), np.float32)
    total = np.zeros((len(metadata), 16, 8), np.float32)
    g, t = np.divmod(_LANE, 4)
    halves = _halves(b_words, kind)
    for i in range(4):
        for half in range(2):
            dense_b[:, 8 * i + 2 * t + half, g] = halves[:, :, i, half]
        total[:, g + 8 * (i // 2), 2 * t + i % 2] = np.ascontiguousarray(c_words[..., i]).view(
            np.float32
        )
    with np.errstate(invalid="ignore"):  # inf times the zeros that the hardware leaves out
        total = (total + dense_a.astype(np.float64) @ dense_b).astype(np.float32)
    for i, name in enumerate(d.strip("{}").split(", ")):
        values = np.ascontiguousarray(total[:, g + 8 * (i // 2), 2 * t + i % 2])
        registers[name] = values.view(np.uint32)


def _dense_a(
    halves: npt.NDArray[np.float32], metadata: Words, first: int
) -> npt.NDArray[np.float32]:
    dense = np.zeros((len(metadata), 16, 32), np.float32)
    warp = np.arange(len(metadata))[:, None]
    g, t = np.divmod(_LANE, 4)
    for i in range(4):
        row, column = g + 8 * (i % 2), 4 * t + 16 * (i // 2)
        owner = 4 * (row % 8) + first + column // 16
        shift = (16 * (row // 8) + column % 16).astype(np.uint32)
        nibble = (metadata[:, owner] >> shift) & 15
        low, high = nibble & 3, nibble >> 2
        assert (low < high).all(), "the indices of ordered metadata ascend"
        dense[warp, row, column + low] = halves[:, :, i, 0]
        dense[warp, row, column + high] = halves[:, :, i, 1]
    return dense


_OPERATIONS: dict[str, Callable[[dict[str, Words], list[str], list[str]], None]] = {
    "mov": _move,
    "and": _binary(np.bitwise_and),
    "or": _binary(np.bitwise_or),
    "xor": _binary(np.bitwise_xor),
    "shl": _binary(lambda a, b: (a << b) & _MASK),
    "shr": _binary(lambda a, b: a >> b),
    "setp": _set_predicate,
    "selp": _select,
    "shfl": _shuffle,
    "prmt": _permute,
    "fma": _fma,
    "mma": _mma_sp,
}
