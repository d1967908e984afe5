"""Builds charts from axes, curves, points and labels, as shapes for pages and SVG files.

Shapes have a style class instead of a colour, so that they work on light and dark pages. The
classes `s0` to `s7` are for series, `v0` to `v8` for the levels of a quantity from low to high, and
`c0` to `c32` for depths. Lengths are in CSS pixels at a chart's full size.
"""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Sequence
from itertools import pairwise

from jexit.report.colours import file_style
from jexit.report.rendering import NO_BREAK, asset, render, short_number

FONT = 12.0
# The mean width of a character in units of the font size, for bold digits in a wide font.
CHARACTER = 0.7
LINE = 12.0  # from one line of a label to the next

Box = tuple[float, float, float, float]  # left, top, right, bottom
Tick = tuple[float, str]  # a value on an axis and its label


@dataclasses.dataclass(frozen=True)
class Path:
    """A line or a shape: `d` is SVG path data, and `title` the tooltip (none if it is empty)."""

    d: str
    classes: str
    title: str = ""


@dataclasses.dataclass(frozen=True)
class Text:
    """A line of text with its `anchor` (start, middle or end) at `x` and its baseline at `y`."""

    x: float
    y: float
    text: str
    classes: str
    anchor: str = "start"


@dataclasses.dataclass(frozen=True)
class ShapeGroup:
    x: float
    y: float
    shapes: Sequence[Path | Text]


@dataclasses.dataclass(frozen=True)
class Axis:
    """An axis of a chart: label, lowest and highest value, and ticks with their texts."""

    label: str
    span: tuple[float, float]
    ticks: Sequence[Tick]

    @classmethod
    def of_numbers(cls, label: str, low: float, high: float, count: int = 5) -> Axis:
        span, values = round_ticks(low, high, count)
        return cls(label, span, tick_texts(values))

    @classmethod
    def of_steps(cls, label: str, first: float, last: float) -> Axis:
        """Returns an axis from exactly `first` to `last`, with ticks at whole numbers."""
        if first == last:
            first, last = first - 0.5, last + 0.5
        values = [v for v in round_ticks(first, last, whole=True)[1] if first <= v <= last]
        return cls(label, (first, last), tick_texts(values) if values else [])

    @classmethod
    def of_shares(cls, label: str, low: float = 0.0, high: float = 1.0) -> Axis:
        """Returns an axis in per cent that contains the fractions `low` and `high`.

        By default, it goes from 0 to 100 % in quarters.
        """
        span, values = round_ticks(low, high)
        if (low, high) == (0.0, 1.0):
            span, values = (0.0, 1.0), [0, 0.25, 0.5, 0.75, 1]
        return cls(label, span, [(value, f"{100 * value:.4g}{NO_BREAK}%") for value in values])

    @classmethod
    def around_shares(cls, label: str, values: Sequence[float]) -> Axis:
        """Returns an axis in per cent around the finite fractions in `values`, within 0–100 %."""
        known = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
        low, high = min(known), max(known)
        reach = max(0.05 * (high - low), (0.2 - (high - low)) / 2, 0.0)
        return cls.of_shares(label, max(low - reach, 0.0), min(high + reach, 1.0))

    @classmethod
    def of_names(cls, label: str, names: Sequence[str]) -> Axis:
        """Returns an axis of names side by side, with the first name at 0 and the second at 1."""
        return cls(label, (-0.5, len(names) - 0.5), [*enumerate(names)])


class Chart:
    """A chart: two linear axes and the shapes drawn on them.

    Methods take x and y in the units of the data. `width`, `height` and the margin `right` are in
    CSS pixels.
    """

    def __init__(
        self,
        title: str,
        x: Axis,
        y: Axis,
        *,
        note: str = "",
        width: float = 460.0,
        height: float = 270.0,
        right: float = 14.0,
    ) -> None:
        self.title, self.note = title, note
        self.width, self.height = width, height
        self.shapes: list[Path | Text] = []
        self.legend: list[tuple[str, Path]] = []
        self._taken: list[Box] = []
        self.left, self.top = max((text_width(text) for _, text in y.ticks), default=0.0) + 12, 24.0
        # The last tick's text is centred below the end of the axis.
        last = max((text_width(text) / 2 for at, text in x.ticks if at == x.span[1]), default=0.0)
        self.right, self.bottom = width - max(right, last), height - 40.0
        self.x_span, self.y_span = x.span, y.span
        self._axes(x, y)

    def _axes(self, x: Axis, y: Axis) -> None:
        for value, text in y.ticks:
            at = self.y(value)
            self.path(f"M{self.left:.1f} {at:.1f}H{self.right:.1f}", "grid")
            self.shapes.append(Text(self.left - 6, at + 4, text, "tick", "end"))
        self.path(f"M{self.left:.1f} {self.bottom:.1f}H{self.right:.1f}", "axis")
        for value, text in x.ticks:
            at = self.x(value)
            self.path(f"M{at:.1f} {self.bottom:.1f}v4", "axis")
            self.shapes.append(Text(at, self.bottom + 17, text, "tick", "middle"))
        middle = (self.left + self.right) / 2
        self.shapes.append(Text(middle, self.height - 5, x.label, "label", "middle"))
        if y.label:
            self.shapes.append(Text(0.0, 12.0, y.label, "label"))

    @property
    def described(self) -> str:
        """The title and the note as one string, for readers who cannot see the chart."""
        return f"{self.title}. {self.note}".strip()

    def x(self, value: float) -> float:
        low, high = self.x_span
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: float) -> float:
        low, high = self.y_span
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

    def path(self, d: str, classes: str, title: str = "") -> None:
        self.shapes.append(Path(d, classes, title))

    def curve(self, xs: Sequence[float], ys: Sequence[float], classes: str) -> None:
        """Draws a line through the points; a point that is not finite leaves a gap."""
        steps, pen = [], "M"
        for x, y in zip(xs, ys, strict=True):
            known = math.isfinite(x) and math.isfinite(y)
            if known:
                steps.append(f"{pen}{self.x(x):.1f} {self.y(y):.1f}")
            pen = "L" if known else "M"
        if steps:
            self.path("".join(steps), classes)

    def band(
        self, xs: Sequence[float], low: Sequence[float], high: Sequence[float], classes: str
    ) -> None:
        """Fills the area between the lines `low` and `high` over the same `xs`.

        Points that are not finite are left out.
        """
        there = [(x, y) for x, y in zip(xs, high, strict=True) if math.isfinite(y)]
        back = [(x, y) for x, y in zip(xs, low, strict=True) if math.isfinite(y)]
        if there and back:
            outline = "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in there + back[::-1])
            self.path(f"M{outline}Z", classes)

    def bar(self, x: float, half: float, y: float, classes: str, title: str) -> None:
        """Draws a bar from the x axis up to `y`, between `x` − `half` and `x` + `half`."""
        left, right = self.x(x - half), self.x(x + half)
        top = min(self.y(y), self.bottom)
        d = f"M{left:.1f} {self.bottom:.1f}V{top:.1f}H{right:.1f}V{self.bottom:.1f}Z"
        self.path(d, classes, title)

    def across(self, x: tuple[float, float], y: float, classes: str) -> None:
        """Draws a horizontal error bar at the height `y`, between the two ends `x`."""
        if all(map(math.isfinite, x)):
            self.keep_clear((x[0], y), (x[1], y))
            (low, high), at = map(self.x, x), self.y(y)
            d = f"M{low:.1f} {at:.1f}H{high:.1f}M{low:.1f} {at - 3:.1f}v6M{high:.1f} {at - 3:.1f}v6"
            self.path(d, f"error {classes}")

    def upright(self, x: float, y: tuple[float, float], classes: str) -> None:
        """Draws a vertical error bar at the position `x`, between the two ends `y`."""
        if all(map(math.isfinite, y)):
            self.keep_clear((x, y[0]), (x, y[1]))
            (low, high), at = map(self.y, y), self.x(x)
            d = f"M{at:.1f} {low:.1f}V{high:.1f}M{at - 3:.1f} {low:.1f}h6M{at - 3:.1f} {high:.1f}h6"
            self.path(d, f"error {classes}")

    def point(
        self, x: float, y: float, shape: str, classes: str, title: str = "", size: float = 1.0
    ) -> None:
        """Draws a marker at (x, y); labels that are placed later avoid it."""
        at_x, at_y = self.x(x), self.y(y)
        self.shapes.append(marker(shape, at_x, at_y, classes, title, size))
        self._taken.append((at_x - 6, at_y - 6, at_x + 6, at_y + 6))

    def told_at(self, columns: Sequence[tuple[float, str]]) -> None:
        """Adds tooltips (x, text), each on an invisible column as high as the chart.

        `columns` is in ascending order of x; neighbouring columns meet halfway between their x
        values.
        """
        xs = [x for x, _ in columns]
        middles = [(a + b) / 2 for a, b in pairwise(xs)]
        ends = pairwise([self.x_span[0], *middles, self.x_span[1]])
        for (left, right), (_, text) in zip(ends, columns, strict=True):
            d = f"M{self.x(left):.1f} {self.top:.1f}H{self.x(right):.1f}V{self.bottom:.1f}"
            self.path(f"{d}H{self.x(left):.1f}Z", "told", text)

    def keep_clear(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Makes labels that are placed later avoid the line from `start` to `end`, if possible."""
        (x1, y1), (x2, y2) = ((self.x(x), self.y(y)) for x, y in (start, end))
        pieces = max(1, round(math.hypot(x2 - x1, y2 - y1) / 6))
        for piece in range(pieces + 1):
            x, y = (a + (b - a) * piece / pieces for a, b in ((x1, x2), (y1, y2)))
            self._taken.append((x - 3, y - 3, x + 3, y + 3))

    def label_points(self, labels: Sequence[tuple[float, float, str, str]]) -> None:
        """Writes each label (x, y, text, class) beside its point, where it overlaps little else.

        Labels of one class whose points almost coincide form one block with a line per text. A thin
        line connects a block to its point if the two are far apart.
        """
        blocks: list[tuple[float, float, str, list[str]]] = []
        for x, y, text, class_ in labels:
            at_x, at_y = self.x(x), self.y(y)
            for block_x, block_y, block_class, texts in blocks:
                if block_class == class_ and math.hypot(block_x - at_x, block_y - at_y) < 7.0:
                    texts.append(text)
                    break
            else:
                blocks.append((at_x, at_y, class_, [text]))
        for at_x, at_y, class_, texts in sorted(blocks, key=lambda block: -len(block[3])):
            box = self._free_box(at_x, at_y, max(map(text_width, texts)), LINE * len(texts))
            self._taken.append(box)
            near = min(max(at_x, box[0]), box[2]), min(max(at_y, box[1]), box[3])
            if math.hypot(near[0] - at_x, near[1] - at_y) > 12.0:
                d = f"M{at_x:.1f} {at_y:.1f}L{near[0]:.1f} {near[1]:.1f}"
                self.path(d, f"leader {class_}")
            # A label to the left of its point is anchored at its end, because its width is a guess.
            x, anchor = (box[2], "end") if box[2] < at_x else (box[0], "start")
            for line, text in enumerate(texts, start=1):
                foot = box[1] + LINE * line - 3
                self.shapes.append(Text(x, foot, text, f"name {class_}", anchor))

    def _free_box(self, x: float, y: float, width: float, height: float) -> Box:
        """Returns the box near (x, y) of this size that overlaps other shapes least, in pixels."""
        steps = (6 + number * LINE for number in range(8))
        downs = [-height / 2, *(down for step in steps for down in (step, -height - step))]
        sides = (x + 9, x - 9 - width, x - width / 2)
        boxes = [(left, y + d, left + width, y + d + height) for d in downs for left in sides]
        return min(boxes, key=self._crowding)

    def _crowding(self, box: Box) -> float:
        inside = (self.left, 14.0, self.width, self.bottom)  # clear of the axes' own texts
        outside = _area(box) - _overlap(box, inside)
        return 10 * outside + sum(_overlap(box, other) for other in self._taken)

    def label_ends(self, ends: Sequence[tuple[float, str, str]]) -> None:
        """Writes labels (y, text, class) to the right of the chart, moved apart if they overlap."""
        low, high = self.y_span
        placed: list[tuple[float, str, str]] = []
        for value, text, classes in sorted(ends, key=lambda end: end[0]):
            at = self.y(min(max(value, low), high)) + 4
            placed.append((min(at, placed[-1][0] - 13) if placed else at, text, classes))
        # Many labels near the top would extend above the chart.
        down = max(self.top + 4 - placed[-1][0], 0.0)
        for at, text, classes in placed:
            self.shapes.append(Text(self.right + 5, at + down, text, f"end {classes}"))

    def explain(self, text: str, classes: str, shape: str = "line") -> None:
        """Adds a text to the legend, with a key: `shape` is line, area or a marker's name."""
        if shape == "line":
            key = Path("M1 7H23", classes)
        elif shape == "area":
            key = Path("M5 1h12v12h-12Z", classes)
        else:
            key = marker(shape, 12.0, 7.0, classes)
        self.legend.append((text, key))


def marker(
    shape: str, x: float, y: float, classes: str, title: str = "", size: float = 1.0
) -> Path:
    """Returns a circle, square, triangle or diamond, hollow if `shape` has the prefix `open-`."""
    kind = shape.removeprefix("open-")
    classes = f"mark open {classes}" if kind != shape else f"mark {classes}"
    if kind == "circle":
        r = 5.0 * size
        half = f"a{r:g} {r:g} 0 1 0 "
        return Path(f"M{x - r:.1f} {y:.1f}{half}{2 * r:g} 0{half}{-2 * r:g} 0Z", classes, title)
    outline = {
        "square": ((-4.5, -4.5), (4.5, -4.5), (4.5, 4.5), (-4.5, 4.5)),
        "triangle": ((0, -5.8), (5.4, 4.2), (-5.4, 4.2)),
        "diamond": ((0, -6.2), (6.2, 0), (0, 6.2), (-6.2, 0)),
    }[kind]
    d = "L".join(f"{x + size * dx:.1f} {y + size * dy:.1f}" for dx, dy in outline)
    return Path(f"M{d}Z", classes, title)


def as_file(charts: Sequence[Chart], columns: int = 1) -> str:
    """Lays out charts in a grid with `columns` columns, and returns the text of an SVG file."""
    width, gap = max(chart.width for chart in charts), 28.0
    groups: list[ShapeGroup] = []
    top = 0.0
    for row in (charts[at : at + columns] for at in range(0, len(charts), columns)):
        heads = [_head(chart) for chart in row]
        head = max(height for _, height in heads)
        for column, (chart, (above, _)) in enumerate(zip(row, heads, strict=True)):
            left = column * (width + gap)
            groups += [ShapeGroup(left + group.x, top + group.y, group.shapes) for group in above]
            groups.append(ShapeGroup(left, top + head, chart.shapes))
        top += head + max(chart.height for chart in row) + 18.0
    columns = min(columns, len(charts))
    return drawing(groups, columns * (width + gap) - gap, top - 18.0)


def drawing(groups: Sequence[ShapeGroup], width: float, height: float) -> str:
    """Returns the text of an SVG file with the given shapes, for light and dark pages."""
    style = file_style(asset("charts.css"))
    return render("drawing.svg", groups=groups, width=width, height=height, style=style)


def _head(chart: Chart) -> tuple[list[ShapeGroup], float]:
    """Returns a chart's title, note and legend as groups of shapes, and their height in pixels."""
    texts = [Text(0.0, 14.0, chart.title, "title")]
    top = 20.0
    for line in textwrap.wrap(chart.note, int(chart.width / (0.8 * CHARACTER * FONT))):
        texts.append(Text(0.0, top + 11.0, line, "label"))
        top += 16.0
    groups, left = [ShapeGroup(0.0, 0.0, texts)], 0.0
    for text, key in chart.legend:
        width = 44.0 + 0.9 * text_width(text)
        if left and left + width > chart.width:
            left, top = 0.0, top + 18.0
        groups.append(ShapeGroup(left, top + 2.0, [key, Text(29.0, 11.0, text, "entry")]))
        left += width
    return groups, top + (24.0 if chart.legend else 6.0)


def text_width(text: str) -> float:
    return CHARACTER * FONT * len(text)


_LEAST = 1e-300  # smaller floats lose digits, and the smallest have no logarithm


def round_ticks(
    low: float, high: float, count: int = 5, *, whole: bool = False
) -> tuple[tuple[float, float], list[float]]:
    """Returns an axis range that contains `low` and `high`, and about `count` round ticks in it.

    The range begins and ends at a tick. With `whole`, the ticks are whole numbers.
    """
    if not high - low > max(1e-9 * max(abs(low), abs(high)), _LEAST):
        reach = 0.5 * abs(low) if abs(low) > _LEAST else 1.0
        low, high = low - reach, high + reach
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * 0.999)
    if whole:
        step = max(1.0, float(math.ceil(step)))
    # A value that exceeds a tick only by a rounding error needs no further tick.
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    values = [index * step for index in range(first, last + 1)]
    return (values[0], values[-1]), values


def tick_texts(values: Sequence[float]) -> list[Tick]:
    """Pairs each tick value with a text that has just enough decimals to distinguish the ticks.

    The values are evenly spaced and ascend.
    """
    step = values[1] - values[0] if len(values) > 1 else 1.0
    size = max(map(abs, values), default=0.0)
    if size >= 1e5 or 0 < size < 1e-3:
        return [(value, short_number(value, 2)) for value in values]
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step < 1 else 0
    digits += step * 10**digits % 1 > 1e-6
    return [(value, f"{value:.{digits}f}".replace("-", "−")) for value in values]


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _overlap(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)
