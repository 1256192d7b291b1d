"""onnxruntime's dense linears are timed as a chain of layers that computes what each layer does."""

import pytest
import torch

from benchmarks import dense_ort


@pytest.mark.parametrize("value_type", dense_ort.NAMES)
def test_every_layer_of_a_chain_is_the_linear(value_type: str) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(48, 64), torch.randn(3, 64)
    model = dense_ort.onnx_models(weight)[value_type]
    run = dense_ort.session(dense_ort.chain(model, 3).SerializeToString())
    inputs = {each.name: (x * scale).numpy() for scale, each in enumerate(run.get_inputs(), 1)}
    assert len(inputs) == len(run.get_outputs()) == 3
    expected = x @ weight.t()
    for scale, y in enumerate(run.run(None, inputs), 1):
        difference = torch.from_numpy(y) - scale * expected
        assert difference.norm() < 0.15 * scale * expected.norm()  # int4 is that coarse


def test_a_side_counts_the_layers_of_a_call() -> None:
    side = dense_ort.Chains(torch.randn(16, 32)).side("fp32", torch.randn(2, 32))
    (call,) = side.calls
    assert side.per_call == len(call()) == dense_ort.LAYERS


def test_a_chain_fits_into_memory_and_into_a_file() -> None:
    assert dense_ort.layers(64 << 20, 8192 * 8192 * 4) == 1
    assert dense_ort.layers(1 << 30, 1) == 1
    assert dense_ort.layers(1 << 10, 1) == dense_ort.LAYERS
