"""Statistics of layers' inputs against their meaning in float64, and how inputs become rows."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsefx.calibrate.inputs import layer_uses
from sparsefx.calibrate.rows import PatchRows, Tokens
from sparsefx.calibrate.statistics import (
    STATISTICS,
    AbsHistogram,
    Gram,
    Moments,
    Sketch,
    SquareSum,
    Statistic,
)
from sparsefx.graph import capture
from sparsefx.prune.weights import prunable_weights

CPU = torch.device("cpu")


def rows(count: int, features: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    scale = torch.logspace(-2, 2, features)
    return torch.randn(count, features, generator=generator) * scale + 0.3 * scale


@pytest.mark.parametrize("features", [1, 255, 256, 600])
def test_gram(features: int) -> None:
    gram, x = Gram(features, CPU), rows(90, features)
    for part in x.split(32):
        gram.add(part, 1)
    expected = x.double().T @ x.double()
    size = expected.diagonal().sqrt()
    torch.testing.assert_close(
        gram.gram.double() / (size[:, None] * size), expected / (size[:, None] * size),
        rtol=0, atol=1e-5,
    )  # fmt: skip
    assert torch.equal(gram.gram[256:, :256], gram.gram[:256, 256:].T)
    torch.testing.assert_close(gram.norms, size, rtol=1e-5, atol=0)
    assert gram.count.tolist() == [90, 3]


def test_gram_goes_on_after_it_was_looked_at() -> None:
    gram, whole, x = Gram(300, CPU), Gram(300, CPU), rows(20, 300)
    gram.add(x[:10], 1)
    assert gram.tensors["gram"].data_ptr() == gram.gram.data_ptr()
    gram.gram.mul_(2)
    gram.add(x[10:], 1)
    whole.add(torch.cat((x[:10], x)), 3)
    torch.testing.assert_close(gram.gram, whole.gram, rtol=1e-5, atol=1e-2)  # of up to 1e5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_squares_and_moments(dtype: torch.dtype) -> None:
    squares, moments = SquareSum(7, CPU), Moments(7, CPU)
    x = rows(500, 7).to(dtype)
    for part in x.split(33):
        squares.add(part, 2)
        moments.add(part, 2)
    wide = x.double()
    torch.testing.assert_close(squares.norms, wide.square().sum(0).sqrt(), rtol=1e-6, atol=0)
    torch.testing.assert_close(moments.norms, squares.norms, rtol=0, atol=0)
    torch.testing.assert_close(moments.mean, wide.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(moments.variance, wide.var(0, correction=0), rtol=1e-5, atol=0)
    assert squares.count.tolist() == moments.count.tolist() == [500, 32]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_histogram_quantile_is_within_a_bin(share: float) -> None:
    histogram, x = AbsHistogram(5, CPU), rows(2000, 5)
    for part in x.split(700):
        histogram.add(part, 1)
    expected = float(x.double().abs().quantile(share))
    width = (AbsHistogram.LARGEST / AbsHistogram.SMALLEST) ** (1 / AbsHistogram.BINS)
    assert expected / width <= histogram.quantile(share) <= expected * width**2
    assert int(histogram.counts.sum()) == x.numel()


def test_histogram_takes_zeros_and_outliers() -> None:
    histogram = AbsHistogram(2, CPU)
    histogram.add(torch.tensor([[0.0, 1e-30], [1e30, 65536.0]]), 1)
    assert int(histogram.counts[0]) == 2 and int(histogram.counts[-1]) == 2


@pytest.mark.parametrize("step", [7, 512, 1100])
def test_a_sketch_estimates_squared_norms(step: int) -> None:
    x = rows(6000, 16)
    x[::500] = 1000 * x[:1]  # a sink at the start of each text, which nearly is all there is
    matrix = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    sketch = Sketch(16, CPU)
    for part in x.split(step):
        sketch.add(part, 1)
    expected = (matrix.double() @ x.double().T).square().sum()
    found = (matrix @ sketch.sums.T).square().sum()
    assert float(found / expected) == pytest.approx(1, abs=3 * (2 / Sketch.ROWS) ** 0.5)


def test_a_sketch_of_few_rows_is_all_of_them() -> None:
    sketch, x = Sketch(5, CPU), rows(Sketch.ROWS, 5)
    for part in x.split(90):
        sketch.add(part, 1)
    torch.testing.assert_close(sketch.sums.T @ sketch.sums, x.T @ x, rtol=1e-4, atol=1e-2)


def test_the_sketches_of_two_processes_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alike rows in both, which would add up to twice their size under the same signs."""
    x, total = rows(3000, 16), torch.zeros(Sketch.ROWS, 16)
    for rank in range(2):
        monkeypatch.setattr("sparsefx.calibrate.together.rank", lambda rank=rank: rank)
        sketch = Sketch(16, CPU)
        sketch.add(x, 1)
        total += sketch.sums
    found, expected = total.square().sum(), 2 * x.square().sum()
    assert float(found / expected) == pytest.approx(1, abs=3 * (2 / Sketch.ROWS) ** 0.5)


@pytest.mark.parametrize("kind", sorted(STATISTICS.keys() - {"sketch"}))
def test_sums_of_two_processes_add_up(kind: str) -> None:
    def of(x: Tensor, samples: int) -> Statistic:
        made = STATISTICS[kind](9, CPU)
        made.add(x, samples)
        return made

    x = rows(40, 9)
    first, second, whole = of(x[:15], 1), of(x[15:], 2), of(x, 3)
    for name, tensor in first.tensors.items():
        tensor += second.tensors[name]
        torch.testing.assert_close(first.tensors[name], whole.tensors[name], rtol=1e-5, atol=1e-4)


def test_padding_tokens_do_not_count() -> None:
    counted = torch.tensor([[True, True, False], [False, True, True]])
    x = torch.arange(12.0).view(2, 3, 2)
    expected = torch.stack((x[0, 0], x[0, 1], x[1, 1], x[1, 2]))
    assert torch.equal(Tokens(2, counted).of(x), expected)
    assert torch.equal(Tokens(2, counted).of(x.flatten(0, 1)), expected)
    assert torch.equal(Tokens(2, counted).of(x[:, 0]), x[:, 0])  # no rows of tokens
    assert torch.equal(Tokens(2).of(x), x.flatten(0, 1))


CONVOLUTIONS = {
    "plain": nn.Conv2d(3, 5, 3),
    "pointwise": nn.Conv2d(3, 5, 1),
    "strided": nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    "same": nn.Conv2d(3, 5, (4, 3), padding="same"),
    "valid": nn.Conv2d(3, 5, 3, padding="valid"),
    "reflecting": nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("shape", [(4, 3, 9, 8), (3, 9, 8)])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_patches_times_the_matrix_are_the_convolution(name: str, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(CONVOLUTIONS[name])
    x = rows(9, torch.Size(shape).numel() // 9).view(shape)
    weight = prunable_weights(model)["0.weight"]
    (use,) = layer_uses(capture(model, (x,)), {"0.weight": "0.weight"})
    convolution = model[0]
    reflects = convolution.padding_mode == "reflect"
    source = F.pad(x, (1, 1, 1, 1), mode="reflect") if reflects else x
    parts = list(use.rows(Tokens(0), source))
    found = torch.cat([part for _, part, _ in parts]) @ weight.matrix().T + convolution.bias
    expected = model(x).view(-1, *model(x).shape[-3:]).permute(0, 2, 3, 1).reshape(found.shape)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert sum(samples for *_, samples in parts) == (x.shape[0] if x.dim() == 4 else 1)


def test_patches_of_groups_are_those_of_their_own_channels() -> None:
    grouped = nn.Conv2d(6, 4, 3, groups=2, bias=False)
    x = torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(0))
    read = PatchRows((3, 3), (1, 1), (0, 0, 0, 0), (1, 1), 2)
    found = list(read(Tokens(2), x))
    assert [(group, samples) for group, _, samples in found] == [(0, 2), (1, 2)]
    parts = prunable_weights(nn.Sequential(grouped))["0.weight"].matrices()
    for (group, own, _), part in zip(found, parts, strict=True):
        expected = grouped(x)[:, 2 * group : 2 * group + 2].flatten(2).transpose(1, 2).flatten(0, 1)
        torch.testing.assert_close(own @ part.T, expected, rtol=1e-4, atol=1e-5)


def test_large_images_are_unfolded_a_few_at_a_time() -> None:
    read = PatchRows((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1)
    parts = list(read(Tokens(3), torch.zeros(3, 64, 128, 128)))
    assert [samples for *_, samples in parts] == [1, 1, 1]
    assert parts[0][1].shape == (128 * 128, 9 * 64)


def test_weights_are_found_behind_casts_and_transposes() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = x @ self.a.weight.t()
            y = torch.addmm(x, y, self.b.weight.transpose(0, 1))
            return F.linear(y, self.c.weight.to(torch.float64).to(torch.float32)) * self.c.weight

    names = {f"{name}.weight": f"{name}.weight" for name in "abc"}
    gm = capture(Products(), (torch.randn(4, 4),))
    uses = layer_uses(gm, names)
    assert [use.parameter for use in uses] == ["a.weight", "b.weight", "c.weight"]
    assert uses[0].sources[0].op == "placeholder" and uses[1].sources == (uses[0].node,)
