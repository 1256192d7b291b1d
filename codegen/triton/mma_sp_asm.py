"""Prints the inline PTX of the sparse tensor core kernel: what one warp does with one block.

A block is 16 rows of W by 256 columns, eight steps of `mma.sp.m16n8k32` (PTX ISA, "Matrix fragments
for sparse mma.m16n8k32 with .f16 and .bf16 types"). Every operand is a Triton tensor of int32 or
float32 of which a thread holds four neighbours: operand i is registers $(4 + 4 i) .. $(7 + 4 i),
behind the four of the result. What the registers hold is told in mma_sp_pack.py.

Registers of A come from what is stored:

    2:4, 16 bits   as stored
    1:4, 16 bits   a word holds the values of two groups, in its halves; a value of columns 0, 1
                   belongs to the first register, one of columns 2, 3 to the second
    int8, int4     (2^7 | code) - 2^7 in bf16 (2^10 in fp16) is exact; then times the scale
"""

from dataclasses import dataclass

STEPS = 8  # k-steps of a block: two a metadata word, so that no bit of the metadata is wasted
COLUMNS = 32 * STEPS
SCALES = 4  # of a row of W in a block: a scale of more columns is repeated, to load 128 bits
CODE_WORDS = {"": 4, "int8": 2, "int4": 1}  # 32-bit words of a lane and k-step, at 2:4

# Both halves, for fma, which takes registers only: one; minus zero, which leaves every product; and
# what is taken off 2^7 + 8 + an int4 code, 2^10 + 8 + that, or 2^10 + 128 + an int8 code.
_ONE = {"bf16": "0x3f803f80", "f16": "0x3c003c00"}
_MINUS_ZERO = "0x80008000"
_LESS = {
    ("bf16", "int4"): "0xc308c308",  # -136
    ("f16", "int4"): "0xe408e408",  # -1032
    ("f16", "int8"): "0xe480e480",  # -1152
    ("bf16", "int8"): "0xc380c380",  # -256; see `_byte_pair`
}


@dataclass(frozen=True)
class Program:
    """Which block program to print: `dtype` "bf16" or "f16", `is_single` for 1:4, kind of codes."""

    dtype: str
    is_single: bool = False
    values: str = ""

    @property
    def loads(self) -> int:
        """How many operands of A a block has: 128 bits a thread each."""
        return STEPS * (2 if self.is_single else CODE_WORDS[self.values]) // 4


def multiply(program: Program) -> str:
    """Operands: metadata, A (`loads`), B (STEPS), scales of codes, accumulator."""
    lines = [".reg .b32 a<4>, e, t, u, one, less, none, s<8>;", *_constants(program)]
    lines += _scales(program)
    for step in range(STEPS):
        made, metadata = _metadata(program, step)
        lines += [*made, *_operand_a(program, step), _mma(program, step, metadata)]
    return "\n".join(("{", *(f" {line}" for line in lines), "}"))


def constraints(program: Program) -> str:
    """Of `multiply`: results are written while operands are still read."""
    operands = program.loads + STEPS + 1 + bool(program.values)
    return ",".join([*["=&f"] * 4, *["r"] * (4 * operands), *["f"] * 4])


def exchange(is_single: bool) -> str:
    """One operand, 16 bytes of a row of x: result is the lane's four registers of B.

    A lane loads two groups of four columns, two words each. At 2:4 an even lane needs the first
    words, its odd neighbour the second words, of all four groups of the two, so that each hands the
    other two words. At 1:4 the lane multiplies its own groups.
    """
    if is_single:  # first word of both groups, second word of both groups
        order = (0, 2, 1, 3)
        return "\n".join(f"mov.b32 ${i}, ${4 + word};" for i, word in enumerate(order))
    return "\n".join(
        (
            "{",
            " .reg .pred even;",
            " .reg .b32 lane, t, u;",
            " mov.u32 lane, %laneid;",
            " and.b32 lane, lane, 1;",
            " setp.eq.u32 even, lane, 0;",
            " selp.b32 t, $5, $4, even;",
            " selp.b32 u, $7, $6, even;",
            " shfl.sync.bfly.b32 t, t, 1, 0x1f, 0xffffffff;",
            " shfl.sync.bfly.b32 u, u, 1, 0x1f, 0xffffffff;",
            " selp.b32 $0, $4, t, even;",
            " selp.b32 $1, $6, u, even;",
            " selp.b32 $2, t, $5, even;",
            " selp.b32 $3, u, $7, even;",
            "}",
        )
    )


EXCHANGE_CONSTRAINTS = ",".join([*["=&r"] * 4, *["r"] * 4])


def _register(operand: int, index: int) -> str:
    return f"${4 + 4 * operand + index}"


def _metadata(program: Program, step: int) -> tuple[list[str], str]:
    """Lines that make the word of metadata of two steps, and where it is.

    The odd step reads the same register from the upper two lanes of each four.
    """
    if not program.is_single:
        return [], _register(0, step // 2)
    if step % 2:
        return [], "e"
    # two of the four bits of a nibble tell two steps apart; the others are 1 and 0 at 1:4
    word = _register(0, step // 4)
    shift = [f"shr.u32 e, {word}, 1;"] if step % 4 else []
    source = "e" if shift else word
    return [*shift, f"and.b32 e, {source}, 0x55555555;", "or.b32 e, e, 0x88888888;"], "e"


def _operand_a(program: Program, step: int) -> list[str]:
    """Lines that make a0 .. a3, or none where they are stored as they are."""
    if program.is_single:
        return _single(program, step)
    lines: list[str] = []
    for i in range(4 if program.values else 0):
        if program.values == "int8":
            word = _register(1 + step // 2, 2 * (step % 2) + i // 2)
            lines += _byte_pair(program, word, i)
        else:
            lines += _nibble_pair(program, _register(1 + step // 4, step % 4), i)
        lines.append(_scaled(program, step, i))
    return lines


def _single(program: Program, step: int) -> list[str]:
    """1:4: bit 7 - step of byte 2 row + half is set if that value is of columns 2 or 3."""
    masks = _register(0, 2)
    lines = [f"shl.b32 t, {masks}, {step};"]
    for row, replicate in enumerate(("0x9988", "0xbbaa")):
        word = _register(1 + step // 2, 2 * (step % 2) + row)
        lines += [
            f"prmt.b32 u, t, t, {replicate};",
            f"and.b32 a{2 + row}, {word}, u;",
            f"xor.b32 a{row}, {word}, a{2 + row};",
        ]
    return lines


def _byte_pair(program: Program, word: str, i: int) -> list[str]:
    """Register a_i from bytes 2 (i % 2) and 2 (i % 2) + 1 of `word`, which hold code + 128."""
    select = ("0x5140", "0x5342")[i % 2]  # a byte, a constant one, the next byte, a constant one
    if program.dtype == "f16":
        return [
            f"prmt.b32 t, {word}, 0x64646464, {select};",  # 1024 + 128 + code
            "fma.rn.f16x2 t, t, one, less;",
        ]
    return [  # bf16 holds seven bits: the eighth chooses whether 128 or 256 is taken off
        f"prmt.b32 t, {word}, 0, {select};",
        "and.b32 u, t, 0x00800080;",
        "xor.b32 u, u, less;",  # -256, or -128 if the bit is set
        "and.b32 t, t, 0x007f007f;",
        "or.b32 t, t, 0x43004300;",  # 128 + the lower seven bits
        "fma.rn.bf16x2 t, t, one, u;",
    ]


def _nibble_pair(program: Program, word: str, i: int) -> list[str]:
    """Register a_i from nibbles i and i + 4 of `word`, which hold code + 8."""
    bias = {"bf16": "0x43004300", "f16": "0x64006400"}[program.dtype]  # 128, 1024
    shift = [f"shr.u32 t, {word}, {4 * i};"] if i else []
    return [
        *shift,
        f"and.b32 t, {'t' if shift else word}, 0x000f000f;",
        f"or.b32 t, t, {bias};",
        f"fma.rn.{program.dtype}x2 t, t, one, less;",
    ]


def _constants(program: Program) -> list[str]:
    if not program.values:
        return []
    return [
        f"mov.b32 one, {_ONE[program.dtype]};",
        f"mov.b32 less, {_LESS[program.dtype, program.values]};",
        f"mov.b32 none, {_MINUS_ZERO};",
    ]


def _scales(program: Program) -> list[str]:
    """s(2 w), s(2 w + 1): the scales of rows r and r + 8 in both halves, for group w."""
    operand = program.loads + STEPS + 1
    return [
        f"prmt.b32 s{2 * group + row}, {_register(operand, group)}, 0, {halves};"
        for group in range(SCALES if program.values else 0)
        for row, halves in enumerate(("0x1010", "0x3232"))
    ]


def _scaled(program: Program, step: int, i: int) -> str:
    scale = f"s{2 * (step * SCALES // STEPS) + i % 2}"
    return f"fma.rn.{program.dtype}x2 a{i}, t, {scale}, none;"


def _mma(program: Program, step: int, metadata: str) -> str:
    first = program.loads + STEPS + 1 + bool(program.values)
    c = [_register(first, i) if step == 0 else f"${i}" for i in range(4)]
    plain = not program.is_single and not program.values
    a = [_register(1 + step, i) if plain else f"a{i}" for i in range(4)]
    b = [_register(1 + program.loads + step, i) for i in range(4)]
    operands = ", ".join(
        f"{{{', '.join(each)}}}" for each in ([f"${i}" for i in range(4)], a, b, c)
    )
    types = f"f32.{program.dtype}.{program.dtype}.f32"
    name = f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.{types}"
    return f"{name} {operands}, {metadata}, {step % 2};"
