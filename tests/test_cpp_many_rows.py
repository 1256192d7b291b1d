"""Generated C++ linears on many rows of x, where they are multiplied column by column."""

import pytest
import torch

from tests.test_cpp_kernels import ISAS, Case

# More columns than a tile, more rows of W than a band, neither a multiple of a register.
OUT, WIDTH = 523, 1104
# From where few rows are multiplied at a time to more than are transposed at a time.
ROWS = (2, 17, 31, 48, 100, 131, 300)


@pytest.mark.parametrize("isa_name", ISAS)
@pytest.mark.parametrize("pattern", [(2, 4), (3, 16), 0.5, 0.9], ids=str)
def test_many_rows_of_every_layout(pattern: tuple[int, int] | float, isa_name: str) -> None:
    case = Case(pattern, torch.float32, OUT, WIDTH, isa_name)
    for rows in ROWS:
        case.check(case.tensor(rows, WIDTH))


@pytest.mark.parametrize("isa_name", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_rows_of_16_bits(dtype: torch.dtype, isa_name: str) -> None:
    case = Case(0.8, dtype, 50, 203, isa_name, bias=True, epilogue="gelu;mul 0;add 1")
    for rows in ROWS:
        case.check(case.tensor(rows, 203))


@pytest.mark.parametrize(
    "epilogue", ["scale 9.0;silu", "scale 9.0;gelu", "gelu_tanh;add 0", "gate_silu;add 0"]
)
def test_activations_of_whole_registers(epilogue: str) -> None:
    case = Case(0.9, torch.float32, 38, 65, None, epilogue=epilogue)
    case.check(case.tensor(70, 65) * 4)


def test_nothing_is_stored() -> None:
    case = Case(1.0, torch.float32, 40, 96, None, bias=True)
    case.check(case.tensor(64, 96))


def test_threads_do_not_change_a_bit() -> None:
    case = Case(0.9, torch.float32, 300, 512, None)
    x = case.tensor(150, 512)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = case.run(x, [])
        torch.set_num_threads(2)
        two = case.run(x, [])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one, two), case
