"""Charts of a pruning as inline SVG, one column a layer: sparsity, output error, predicted time."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from sparsefx import report_words as words
from sparsefx.prune.report.layers import PrunedLayer
from sparsefx.report_charts import HEIGHT, WIDTH, line, plot
from sparsefx.report_page import text

_WIDE, _NARROW = 150, 40  # letters of block names under a plot, on a desktop and on a phone
_LEAST, _MOST = 1e-9, 1e15  # where an axis may end; what lies beyond is drawn at its end


def charts(layers: Sequence[PrunedLayer]) -> str:
    """The three charts; one that no layer has numbers for is left out."""
    return _sparsity(layers) + _errors(layers) + _times(layers) if layers else ""


def _sparsity(layers: Sequence[PrunedLayer]) -> str:
    axis = Axis(1.0, 0.25)
    drawn = "".join(
        axis.bar(layers, at, layer.reached, "missed" if layer.missed else "sparse", _zeros(layer))
        + axis.mark(layers, at, layer.asked)
        for at, layer in enumerate(layers)
    )
    key = {"sparse": "reached", "asked": "asked"}
    if any(layer.missed for layer in layers):
        key |= {"missed": "reached, over one point from what was asked"}
    return axis.plot("Sparsity", layers, drawn, key, lambda value: f"{value:.0%}")


def _zeros(layer: PrunedLayer) -> str:
    return f"{words.share(layer.reached)} zeros, {words.share(layer.asked)} asked"


def _errors(layers: Sequence[PrunedLayer]) -> str:
    errors = [layer.error for layer in layers if layer.error is not None]
    if not errors:
        return ""
    axis = Axis.upto(errors)
    drawn = "".join(
        axis.bar(layers, at, layer.error, "error", f"error {words.figure(layer.error)}")
        for at, layer in enumerate(layers)
        if layer.error is not None
    )
    key = {"error": "||(W - W&#x27;)X|| / ||W X|| on the calibration data"}
    return axis.plot("Output error", layers, drawn, key, lambda value: f"{value:g}")


def _times(layers: Sequence[PrunedLayer]) -> str:
    times = [us for layer in layers for us in (layer.dense_us, layer.sparse_us) if us is not None]
    if not times:
        return ""
    axis = Axis.upto(times)
    drawn = ""
    for at, layer in enumerate(layers):
        pair = [("dense", layer.dense_us), ("sparse", layer.sparse_us)]
        bars = [(style, us) for style, us in pair if us is not None]
        said = ", ".join(f"{words.duration(us)} {style}" for style, us in bars)
        # The lower bar last, so that it stands in front of the other.
        for style, us in sorted(bars, key=lambda bar: -bar[1]):
            drawn += axis.bar(layers, at, us, style, said)
    key = {"dense": "dense", "sparse": "as pruned"}
    return axis.plot("Predicted time", layers, drawn, key, words.duration)


class Axis:
    """A vertical axis from 0 to `top`, ticked every `step`, over columns of equal width."""

    def __init__(self, top: float, step: float) -> None:
        self.top, self.step = top, step

    @classmethod
    def upto(cls, values: Sequence[float]) -> "Axis":
        """An axis that holds the finite ones of `values`, with 2 to 5 steps of 1, 2 or 5 * 10^n."""
        most = max((value for value in values if math.isfinite(value)), default=0.0) or 1.0
        most = min(max(most, _LEAST), _MOST)
        ten = 10.0 ** math.floor(math.log10(most))
        step = next(step for step in (ten / 5, ten / 2, ten, 2 * ten, 5 * ten) if most <= 5 * step)
        return cls(step * math.ceil(most / step - 1e-9), step)

    def y(self, value: float) -> float:
        """Where `value` is; NaN and what lies beyond an end is at that end, NaN at the top."""
        return HEIGHT * (1 - max(value, 0.0) / self.top) if value <= self.top else 0.0

    def bar(
        self, layers: Sequence[PrunedLayer], at: int, value: float, style: str, said: str
    ) -> str:
        """The bar of layer number `at`; its tooltip names the layer and says `said`."""
        step, y = WIDTH / len(layers), self.y(value)
        return (
            f'<rect class="{style}" data-at="{at}" x="{(at + 0.1) * step:.2f}" y="{y:.1f}" '
            f'width="{0.8 * step:.2f}" height="{max(HEIGHT - y, 1):.1f}">'
            f"<title>{text(layers[at].label)}: {said}</title></rect>"
        )

    def mark(self, layers: Sequence[PrunedLayer], at: int, value: float) -> str:
        """A line across the column of layer number `at`."""
        step, y = WIDTH / len(layers), self.y(value)
        place = f'x1="{at * step:.2f}" x2="{(at + 1) * step:.2f}" y1="{y:.1f}" y2="{y:.1f}"'
        return f'<line class="asked" {place}/>'

    def plot(
        self,
        name: str,
        layers: Sequence[PrunedLayer],
        drawn: str,
        key: dict[str, str],
        label: Callable[[float], str],
    ) -> str:
        """The card around `drawn`: bands of blocks behind it, grid, ticks and names of blocks."""
        marks = [self.step * tick for tick in range(round(self.top / self.step) + 1)]
        grid = "".join(line(self.y(mark), "grid") for mark in marks)
        ticks = [(self.y(mark), label(mark)) for mark in marks]
        if parent := _parent(layers):
            key = key | {"band": text(f"blocks of {parent}")}
        base = line(HEIGHT, "one")
        head = f"{name} by layer, in model order"
        return plot(head, ticks, _bands(layers) + grid + drawn + base, key, _under(layers))


def _groups(layers: Sequence[PrunedLayer]) -> Iterator[tuple[str, int, int]]:
    """Runs of layers of one block: its name, its first layer, how many they are."""
    first = 0
    for block, members in groupby(layers, key=lambda layer: layer.block):
        count = len(list(members))
        yield block, first, count
        first += count


def _bands(layers: Sequence[PrunedLayer]) -> str:
    step = WIDTH / len(layers)
    return "".join(
        f'<rect class="band" x="{first * step:.2f}" y="0" width="{count * step:.2f}" '
        f'height="{HEIGHT}"><title>{text(block)}</title></rect>'
        for number, (block, first, count) in enumerate(_groups(layers))
        if number % 2
    )


def _parent(layers: Sequence[PrunedLayer]) -> str:
    """What the names of all blocks begin with, up to a dot: "model.layers"."""
    paths = [block.split(".")[:-1] for block, _, _ in _groups(layers) if block]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _under(layers: Sequence[PrunedLayer]) -> str:
    """Names of blocks under a plot: as many as fit on a desktop, fewer on a phone."""
    parent = _parent(layers)
    groups = [
        (block.removeprefix(f"{parent}."), first + count / 2)
        for block, first, count in _groups(layers)
        if block
    ]
    longest = max((len(name) for name, _ in groups), default=0) + 2
    every = math.ceil(len(groups) * longest / _WIDE) or 1
    rarely = every * math.ceil(len(groups) / every * longest / _NARROW)
    labels = "".join(
        f"<span{'' if at % rarely == 0 else ' class=minor'} "
        f'style="left:{100 * middle / len(layers):.2f}%">{text(name)}</span>'
        for at, (name, middle) in enumerate(groups)
        if at % every == 0
    )
    return f'<div class="blocks">{labels}</div>'
