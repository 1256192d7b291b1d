"""Weights that change between calls of a generated C++ linear are checked and read anew."""

import pytest
import torch

from sparsefx.errors import ShapeMismatch
from tests.test_cpp_kernels import Case


def test_a_weight_is_checked_again_once_its_memory_is_another() -> None:
    case = Case((2, 4), torch.float32, 4, 32, None)
    x, values = case.tensor(2, 32), case.lowering.packed[0]
    before = case.run(x, [])
    values.set_((values * 2).contiguous())  # type: ignore[call-overload]
    assert torch.equal(case.run(x, []), before * 2)
    values.data = values.data * 2
    assert torch.equal(case.run(x, []), before * 4)
    values.resize_(values.numel() - 1)
    with pytest.raises(ShapeMismatch, match="values has shape"):
        case.run(x, [])


def test_a_weight_that_is_turned_over_in_place_is_refused() -> None:
    case = Case((2, 4), torch.float32, 4, 64, None)
    x = case.tensor(2, 64)
    case.run(x, [])
    case.lowering.packed[1].t_()
    with pytest.raises(ShapeMismatch, match="features"):
        case.run(x, [])


def test_each_width_of_x_is_checked() -> None:
    case = Case(0.5, torch.float32, 4, 32, None)
    case.check(case.tensor(2, 32))
    with pytest.raises(ShapeMismatch, match="bytes of index or bits"):
        case.run(case.tensor(2, 64), [])


def test_strided_weights_and_those_of_inference_mode_are_read_anew() -> None:
    case = Case((2, 4), torch.float32, 4, 32, None)
    x, (values, bits) = case.tensor(2, 32), case.lowering.packed
    want = case.run(x, [])
    strided = torch.stack([values, values], -1)[..., 0]
    assert torch.equal(case.lowering.run(x, packed=[strided, bits]), want)
    strided.mul_(2)
    assert torch.equal(case.lowering.run(x, packed=[strided, bits]), want * 2)
    with torch.inference_mode():
        copy = values.clone()
        assert torch.equal(case.lowering.run(x, packed=[copy, bits]), want)
        copy.mul_(2)
        assert torch.equal(case.lowering.run(x, packed=[copy, bits]), want * 2)
