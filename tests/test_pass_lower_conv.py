"""Convolutions with sparse weights, from a model to the kernel or to the reason for dense."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparsefx
from examples import real_models
from sparsefx.api import targets
from sparsefx.compiler import Compiler, Plan
from sparsefx.convolutions import ConvLowering, ConvSpec, Taps
from sparsefx.guard import Verdict
from sparsefx.passes import pipelines
from sparsefx.report import Row
from sparsefx.session import Session
from sparsefx.target import Target
from tests.compilers import accept, accept_attention, accept_conv, run_graph

CPU = targets()["cpu"]


def pruned(module: nn.Module, density: float = 0.2) -> Any:
    """The module with zeros in the weights of its convolutions."""
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter *= torch.rand(parameter.shape, generator=random) < density
    return module.eval()


class Residual(nn.Module):
    """As in a ResNet: a dense stem, 3x3 and 1x1 of either stride, a shortcut, a pooled head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 16, 7, 2, 3), nn.BatchNorm2d(16)
        self.reduce, self.mix = nn.Conv2d(16, 24, 1, bias=False), nn.Conv2d(24, 24, 3, 2, 1)
        self.expand, self.shortcut = nn.Conv2d(24, 32, 1), nn.Conv2d(16, 32, 1, 2)
        self.depthwise = nn.Conv2d(32, 32, 3, padding="same", groups=32)
        self.last, self.head = nn.Conv2d(32, 20, 3, padding="same"), nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        y = self.expand(self.mix(self.reduce(x).relu()).relu())
        y = self.depthwise((y + self.shortcut(x)).relu())
        z: Tensor = self.head(self.last(y).view(len(y), 20, -1).mean(2))
        return z


KERNELS = {"reduce", "mix", "expand", "shortcut", "last"}


def lowered(
    model: nn.Module,
    x: Tensor,
    judge: Any = accept_conv,
    proof: bool = True,
    dynamic: bool | None = None,
    target: Target = CPU,
) -> tuple[Any, dict[str, Row]]:
    """The compiled model, called once with x and compared, and the rows of its convolutions."""
    torch._dynamo.reset()
    judges = pipelines.Judges(accept, accept_attention, judge, proof)
    plan = Plan(pipelines.inference(target, judges), (), emit=run_graph)
    compiler = Compiler(plan, Session("model", "cpu", "test"))
    fast = torch.compile(model, backend=compiler, dynamic=dynamic)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    rows = {row.name: row for row in compiler.session.graphs[-1].rows if row.op == "conv"}
    assert not [text for row in rows.values() for text in row.violations()]
    return fast, rows


def test_a_residual_model_and_its_rows() -> None:
    _, rows = lowered(pruned(Residual()), torch.randn(2, 3, 30, 26))
    assert {name for name, row in rows.items() if row.kernel == "cpp_conv2d"} == KERNELS
    row = rows["mix"]
    assert row.shape == "24x24x3x3/2 @ 2x15x13" and row.pattern.startswith("unstructured ")
    assert row.speedup == 2 and row.kept_bytes == row.stored_bytes + row.dense_bytes
    assert "7x7" not in rows["stem"].reason and "neither 1x1 nor 3x3" in rows["stem"].reason
    assert "depthwise" in rows["depthwise"].reason


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_by_inductor(layout: torch.memory_format) -> None:
    torch._dynamo.reset()
    model = pruned(Residual()).to(memory_format=layout)
    fast = sparsefx.compile(model, guard="off")
    x = torch.randn(2, 3, 32, 32).contiguous(memory_format=layout)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    rows = {row.name: row for row in sparsefx.explain(fast).rows}
    assert {name for name, row in rows.items() if row.kernel == "cpp_conv2d"} == KERNELS
    model.mix.weight.mul_(-1)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_measured_rows_have_two_times() -> None:
    torch._dynamo.reset()
    model = pruned(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()), 0.05)
    fast, x = sparsefx.compile(model), torch.randn(1, 64, 24, 24)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    (row,) = sparsefx.explain(fast).rows
    assert row.how == "measured" and row.dense_us and row.sparse_us
    assert row.error is not None and row.error < 1e-4 and not row.violations()


@pytest.mark.slow
def test_efficientnet() -> None:
    _, rows = lowered(pruned(real_models.efficientnet_lite0(), 0.5), torch.randn(1, 3, 224, 224))
    assert sum(bool(row.kernel) for row in rows.values()) > 30
    assert all("depthwise" in row.reason for row in rows.values() if not row.kernel)


@torch.no_grad()
def test_weights_changed_in_place_and_shared_by_graphs() -> None:
    model = pruned(Residual())
    fast, _ = lowered(model, x := torch.randn(1, 3, 24, 24))
    for parameter in (model.mix.weight, model.mix.bias, model.last.weight):
        parameter.mul_(-2)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_batch_that_varies_is_judged_at_one_and_at_more() -> None:
    asked: list[int] = []
    lost: set[int] = set()

    def judge(spec: ConvSpec, *rest: Any) -> Verdict:
        asked.append(spec.batch)
        return Verdict(2.0, 3.0 if spec.batch in lost else 1.0, "modelled")

    model, x = pruned(nn.Sequential(nn.Conv2d(3, 8, 3))), torch.randn(5, 3, 9, 9)
    torch._dynamo.mark_dynamic(x, 0)
    fast, rows = lowered(model, x, judge)
    assert sorted(asked) == [1, 5, 20] and rows["0"].kernel and "@ 5..x9x9" in rows["0"].shape
    with torch.no_grad():
        more = torch.randn(11, 3, 9, 9)
        torch.testing.assert_close(fast(more), model(more), rtol=1e-4, atol=1e-5)
    for batch in (1, 20):
        lost = {batch}
        _, rows = lowered(model, x, judge)
        assert not rows["0"].kernel and "at other numbers of images" in rows["0"].reason


def test_images_of_varying_sizes_stay_dense() -> None:
    _, rows = lowered(
        pruned(nn.Sequential(nn.Conv2d(3, 8, 3))), torch.randn(2, 3, 9, 9), dynamic=True
    )
    assert "sizes of images vary" in rows["0"].reason


class Function(nn.Module):
    """conv2d on a weight that the graph computes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.conv2d(x, self.weight * 2)


@pytest.mark.parametrize(
    ("model", "size", "reason"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), (1, 4, 9, 9), "grouped"),
        (nn.Conv2d(4, 4, 3, dilation=2), (1, 4, 9, 9), "dilated"),
        (nn.Conv2d(4, 4, 3, stride=(1, 2)), (1, 4, 9, 9), "differs between the axes"),
        (nn.Conv2d(4, 4, 3, stride=3), (1, 4, 9, 9), "stride is neither"),
        (nn.Conv2d(4, 4, (1, 3)), (1, 4, 9, 9), "window"),
        (nn.Conv2d(4, 4, 4, padding="same"), (1, 4, 9, 9), "differs between the axes"),
        (nn.Conv2d(4, 4, 3), (4, 9, 9), "no batch dimension"),
        (nn.Conv1d(4, 4, 3), (1, 4, 9), "only 2-d"),
        (nn.ConvTranspose2d(4, 4, 3), (1, 4, 9, 9), "only 2-d"),
        (Function(), (1, 3, 9, 9), "computed or changed"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_what_stays_dense_says_why(model: nn.Module, size: tuple[int, ...], reason: str) -> None:
    _, rows = lowered(pruned(nn.Sequential(model)), torch.randn(size))
    (row,) = rows.values()
    assert not row.kernel and reason in row.reason


def test_few_zeros_a_lost_race_and_a_target_without_kernels() -> None:
    x, model = torch.randn(1, 4, 9, 9), nn.Sequential(nn.Conv2d(4, 8, 3))
    _, rows = lowered(pruned(model, 0.9), x)
    assert "at least 25 %" in rows["0"].reason
    model = pruned(model)

    def lose(*_: Any) -> Verdict:
        return Verdict(1.0, 2.0, "measured")

    _, rows = lowered(model, x, lose)
    assert rows["0"].reason == "cpp_conv2d: the sparse kernel is not faster than dense (measured)"
    assert lowered(model, x, lose, proof=False)[1]["0"].kernel
    _, rows = lowered(model, x, target=replace(CPU, convolutions=()))
    assert rows["0"].reason == "target cpu has no kernel for convolutions"


def test_a_kernel_that_does_not_build_or_fails_stays_dense() -> None:
    def fail(
        spec: ConvSpec, weight: Tensor, taps: Taps, bias: Tensor | None, lowering: ConvLowering
    ) -> Verdict:
        raise OSError("no room")

    _, rows = lowered(pruned(nn.Sequential(nn.Conv2d(4, 8, 3))), torch.randn(1, 4, 9, 9), fail)
    assert rows["0"].reason == "cpp_conv2d: no room"
