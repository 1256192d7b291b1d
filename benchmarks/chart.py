"""A line chart of speed-ups as an SVG file's text: the same text from the same figures."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 56, 190, 34, 46
COLOURS = (
    "#1b6ca8", "#d1495b", "#2e8b57", "#8e5ea2", "#c77d0a", "#5b5b5b", "#17a2a2", "#a0522d",
    "#6b8e23", "#c71585", "#4169e1",
)  # fmt: skip


def crossover(points: Points) -> float | None:
    """Where a curve first falls below 1, straight between points on a logarithmic x axis.

    None if it never does; the first x if it starts there.
    """
    before: tuple[float, float] | None = None
    for x, y in sorted(points):
        if y < 1:
            if before is None:
                return x
            share = (before[1] - 1) / (before[1] - y)
            return math.exp(math.log(before[0]) + share * math.log(x / before[0]))
        before = (x, y)
    return None


@dataclass(frozen=True)
class Axes:
    """Where figures lie on the paper: x as given or logarithmic, y logarithmic, 2^low to 2^high."""

    xs: tuple[float, ...]
    low: int
    high: int
    is_logarithmic: bool

    @classmethod
    def around(cls, series: Mapping[str, Points], is_logarithmic: bool) -> "Axes":
        """All points of all curves."""
        points = [point for curve in series.values() for point in curve]
        powers = [math.log2(y) for _, y in points]
        low, high = math.floor(min(-1.0, *powers)), math.ceil(max(1.0, *powers))
        return cls(tuple(sorted({x for x, _ in points})), low, high, is_logarithmic)

    def across(self, x: float) -> float:
        """From left to right."""
        scale = math.log if self.is_logarithmic else float
        start, end = scale(self.xs[0]), scale(self.xs[-1])
        return LEFT + (scale(x) - start) / ((end - start) or 1) * (WIDTH - LEFT - RIGHT)

    def down(self, y: float) -> float:
        """From top to bottom."""
        share = (self.high - math.log2(y)) / (self.high - self.low)
        return TOP + share * (HEIGHT - TOP - BOTTOM)

    def grid(self) -> Iterator[str]:
        """Lines and labels; the line of 1x is black."""
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        for power in range(self.low, self.high + 1):
            y = self.down(2.0**power)
            yield _line(LEFT, y, right, y, "#ddd" if power else "#000")
            yield _text(LEFT - 6, y + 4, f"{2.0**power:g}x", "end")
        for x in self.xs:
            yield _line(self.across(x), TOP, self.across(x), bottom, "#eee")
            yield _text(self.across(x), bottom + 16, f"{x:g}", "middle")

    def curve(self, points: Points, colour: str) -> Iterator[str]:
        """The line, and a ring where it crosses 1x."""
        placed = " ".join(f"{self.across(x):.1f},{self.down(y):.1f}" for x, y in sorted(points))
        yield f'<polyline points="{placed}" fill="none" stroke="{colour}" stroke-width="2"/>'
        crossed = crossover(points)
        if crossed is not None and crossed > self.xs[0]:
            yield (
                f'<circle cx="{self.across(crossed):.1f}" cy="{self.down(1):.1f}" r="5" '
                f'fill="#fff" stroke="{colour}" stroke-width="2"/>'
            )


def chart(
    title: str, x_label: str, series: Mapping[str, Points], *, is_logarithmic: bool = True
) -> str:
    """Speed-up over x, a curve for each name; a ring where a curve falls below 1, dense."""
    axes = Axes.around(series, is_logarithmic)
    parts = [_text(LEFT, 18, title, "start", "bold"), *axes.grid()]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x_label, "middle"))
    for number, (name, points) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        y = TOP + 10 + 18 * number
        parts += axes.curve(points, colour)
        parts.append(_line(WIDTH - RIGHT + 14, y, WIDTH - RIGHT + 34, y, colour, 2))
        parts.append(_text(WIDTH - RIGHT + 40, y + 4, name, "start"))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="12">\n<rect width="{WIDTH}" height="{HEIGHT}" '
        f'fill="#fff"/>\n{body}\n</svg>\n'
    )


def _line(x1: float, y1: float, x2: float, y2: float, stroke: str, width: int = 1) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}" '
        f'stroke-width="{width}"/>'
    )


def _text(x: float, y: float, text: str, anchor: str, weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">'
        f"{escape(text)}</text>"
    )
