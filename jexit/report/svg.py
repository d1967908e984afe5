"""Small charts as inline SVG, coloured by the page's style sheet so that light and dark both work.

Marks carry a class instead of a colour: `s0` to `s7` name a series, `c0` to `c32` a step of the
depth palette. Widths are in the chart's own units, which are CSS pixels at its full size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from jexit.report.markup import NO_BREAK, Html, tag

SERIES = 8  # colours and dashes that the style sheet has
FONT = 12.0
# The mean width of a character in units of the font size: of bold figures in a wide font.
CHARACTER = 0.7

Box = tuple[float, float, float, float]  # left, top, right, bottom


class Chart:
    """One pair of linear axes and the marks on them; x and y are in the data's own units.

    Args:
      title: What the chart shows, for its caption and for readers who do not see it.
      x, y: Lowest and highest value of each axis.
      x_label, y_label: What each axis measures, with its unit.
      x_ticks, y_ticks: Value and text of each tick.
      note: A sentence below the title.
    """

    def __init__(
        self,
        title: str,
        *,
        x: tuple[float, float],
        y: tuple[float, float],
        x_label: str,
        y_label: str,
        x_ticks: Sequence[tuple[float, str]],
        y_ticks: Sequence[tuple[float, str]],
        note: str = "",
        width: float = 460.0,
        height: float = 270.0,
        right: float = 14.0,
    ) -> None:
        self.title, self.note = title, note
        self.width, self.height = width, height
        tick_width = max((text_width(text) for _, text in y_ticks), default=0.0)
        self.left, self.top = tick_width + 12.0, 24.0
        # The last tick's text is centred below the end of the axis.
        last = max((text_width(text) / 2 for value, text in x_ticks if value == x[1]), default=0.0)
        self.right, self.bottom = width - max(right, last), height - 40.0
        self.x_range, self.y_range = x, y
        self._marks: list[Html] = []
        self._legend: list[Html] = []
        self._taken: list[Box] = []
        for value, text in y_ticks:
            at = self.y(value)
            self._marks.append(line(self.left, at, self.right, at, "grid"))
            self.text(self.left - 6, at + 4, text, "tick", anchor="end")
        self._marks.append(line(self.left, self.bottom, self.right, self.bottom, "axis"))
        for value, text in x_ticks:
            at = self.x(value)
            self._marks.append(line(at, self.bottom, at, self.bottom + 4, "axis"))
            self.text(at, self.bottom + 17, text, "tick", anchor="middle")
        middle = (self.left + self.right) / 2
        self.text(middle, height - 5, x_label, "label", anchor="middle")
        if y_label:
            self.text(0.0, 12.0, y_label, "label")

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (self.right - self.left)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

    def add(self, mark: Html) -> None:
        self._marks.append(mark)

    def text(self, x: float, y: float, text: str, class_: str, anchor: str | None = None) -> None:
        """Writes at a place in the chart's own units."""
        self.add(tag("text", text, x=x, y=y, class_=class_, text_anchor=anchor))

    def curve(self, xs: Sequence[float], ys: Sequence[float], class_: str) -> None:
        """A line through the points; one that is not finite leaves a gap."""
        steps, pen = [], "M"
        for x, y in zip(xs, ys, strict=True):
            if math.isfinite(x) and math.isfinite(y):
                steps.append(f"{pen}{self.x(x):.1f} {self.y(y):.1f}")
                pen = "L"
            else:
                pen = "M"
        if steps:
            self.add(tag("path", d="".join(steps), class_=class_))

    def band(
        self, xs: Sequence[float], low: Sequence[float], high: Sequence[float], class_: str
    ) -> None:
        """The area between two lines over the same xs."""
        there = [(x, y) for x, y in zip(xs, high, strict=True) if math.isfinite(y)]
        back = [(x, y) for x, y in zip(xs, low, strict=True) if math.isfinite(y)]
        if there and back:
            outline = "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in there + back[::-1])
            self.add(tag("path", d=f"M{outline}Z", class_=class_))

    def bar(self, x: float, half: float, y: float, class_: str, title: str) -> None:
        """A bar from the foot of the chart up to y."""
        left, right, top = self.x(x - half), self.x(x + half), self.y(y)
        height = max(self.bottom - top, 0.0)
        box = {"x": left, "y": top, "width": right - left, "height": height}
        self.add(tag("rect", tag("title", title), **box, class_=class_))

    def errors(
        self,
        x: float,
        y: float,
        class_: str,
        *,
        across: tuple[float, float] | None = None,
        up: tuple[float, float] | None = None,
    ) -> None:
        """Error bars: `across` is an interval on the x axis, `up` one on the y axis."""
        at_x, at_y = self.x(x), self.y(y)
        if across is not None and all(map(math.isfinite, across)):
            low, high = map(self.x, across)
            d = f"M{low:.1f} {at_y:.1f}H{high:.1f}M{low:.1f} {at_y - 3:.1f}v6M{high:.1f} "
            self.add(tag("path", d=f"{d}{at_y - 3:.1f}v6", class_=f"error {class_}"))
        if up is not None and all(map(math.isfinite, up)):
            low, high = map(self.y, up)
            d = f"M{at_x:.1f} {low:.1f}V{high:.1f}M{at_x - 3:.1f} {low:.1f}h6M{at_x - 3:.1f} "
            self.add(tag("path", d=f"{d}{high:.1f}h6", class_=f"error {class_}"))

    def dot(self, x: float, y: float, class_: str) -> None:
        """A measured point on a curve."""
        self.add(tag("circle", cx=self.x(x), cy=self.y(y), r=2.5, class_=f"dot {class_}"))

    def marker(
        self, x: float, y: float, shape: str, class_: str, title: str, *, size: float = 1.0
    ) -> None:
        """A point, with a text that shows when the pointer rests on it."""
        at_x, at_y = self.x(x), self.y(y)
        self.add(mark(shape, at_x, at_y, class_, title, size=size))
        self._taken.append((at_x - 6, at_y - 6, at_x + 6, at_y + 6))

    def keep_clear(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Labels placed later keep off the line between two points, where they can."""
        (x1, y1), (x2, y2) = ((self.x(x), self.y(y)) for x, y in (start, end))
        pieces = max(1, round(math.hypot(x2 - x1, y2 - y1) / 6))
        for piece in range(pieces + 1):
            x, y = (a + (b - a) * piece / pieces for a, b in ((x1, x2), (y1, y2)))
            self._taken.append((x - 3, y - 3, x + 3, y + 3))

    def label_points(self, labels: Sequence[tuple[float, float, str, str]]) -> None:
        """Writes each (x, y, text, class) beside its point, where it covers least of the others.

        Texts of one class whose points lie on each other stand in one block, a line each; a thin
        line leads from a block that had to go further to its point.
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
            width, height = max(map(text_width, texts)), 12.0 * len(texts)
            lines = (-height / 2, *(6 + number * 12.0 for number in range(8)))
            downs = sorted((*lines, *(-height - down for down in lines[1:])), key=abs)
            places = [
                (left, at_y + down)
                for down in downs
                for left in (at_x + 9, at_x - 9 - width, at_x - width / 2)
            ]
            boxes = [(left, top, left + width, top + height) for left, top in places]
            box = min(boxes, key=self._crowding)
            self._taken.append(box)
            near = min(max(at_x, box[0]), box[2]), min(max(at_y, box[1]), box[3])
            if math.hypot(near[0] - at_x, near[1] - at_y) > 16.0:
                self.add(line(at_x, at_y, *near, f"leader {class_}"))
            for number, text in enumerate(texts, start=1):
                self.text(box[0], box[1] + 12.0 * number - 3, text, f"name {class_}")

    def legend(self, text: str, class_: str, shape: str = "line") -> None:
        """An entry of the legend below the caption."""
        if shape == "line":
            key = tag("path", d="M1 7H23", class_=class_)
        elif shape == "square-fill":
            key = tag("rect", x=5, y=1, width=12, height=12, class_=class_)
        else:
            key = mark(shape, 12.0, 7.0, class_)
        key = tag("svg", key, viewBox="0 0 24 14", class_="key", aria_hidden="true")
        self._legend.append(tag("li", key, text))

    def figure(self) -> Html:
        """The finished figure with its caption and legend."""
        described = f"{self.title}. {self.note}".strip()
        svg = tag(
            "svg",
            *self._marks,
            viewBox=f"0 0 {self.width:g} {self.height:g}",
            role="img",
            aria_label=described,
        )
        caption = tag(
            "figcaption",
            tag("strong", self.title),
            tag("span", self.note) if self.note else None,
            tag("ul", *self._legend, class_="legend") if self._legend else None,
        )
        return tag("figure", caption, svg, class_="chart", style=f"--full:{self.width:g}px")

    def _crowding(self, box: Box) -> float:
        inside = (self.left, 14.0, self.width, self.bottom)  # clear of the axes' own texts
        outside = _area(box) - _overlap(box, inside)
        return 10 * outside + sum(_overlap(box, other) for other in self._taken)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Html:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def mark(
    shape: str, x: float, y: float, class_: str, title: str = "", *, size: float = 1.0
) -> Html:
    """A marker: circle, square, triangle or diamond; `open-` before it leaves it hollow."""
    kind = shape.removeprefix("open-")
    classes = f"mark {'open ' if kind != shape else ''}{class_}"
    told = tag("title", title) if title else None
    if kind == "circle":
        return tag("circle", told, cx=x, cy=y, r=5.0 * size, class_=classes)
    outline = {
        "square": ((-4.5, -4.5), (4.5, -4.5), (4.5, 4.5), (-4.5, 4.5)),
        "triangle": ((0, -5.8), (5.4, 4.2), (-5.4, 4.2)),
        "diamond": ((0, -6.2), (6.2, 0), (0, 6.2), (-6.2, 0)),
    }[kind]
    d = "L".join(f"{x + size * dx:.1f} {y + size * dy:.1f}" for dx, dy in outline)
    return tag("path", told, d=f"M{d}Z", class_=classes)


def side_by_side(charts: Sequence[Chart], *, small: bool = False) -> Html:
    """Charts side by side, as many in a row as there is room for."""
    drawn = [chart.figure() for chart in charts]
    return tag("div", *drawn, class_="figures small" if small else "figures")


def text_width(text: str, size: float = FONT) -> float:
    return CHARACTER * size * len(text)


_LEAST = 1e-300  # floats below lose digits, and their logarithm at last


def ticks(
    low: float, high: float, count: int = 5, *, whole: bool = False
) -> tuple[tuple[float, float], list[float]]:
    """Round numbers that span the values, about `count` of them, and the range they span."""
    if not high - low > max(1e-9 * max(abs(low), abs(high)), _LEAST):
        reach = 0.5 * abs(low) if abs(low) > _LEAST else 1.0
        low, high = low - reach, high + reach
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * 0.999)
    if whole:
        step = max(1.0, float(math.ceil(step)))
    # A value a rounding error beyond a tick needs no further tick.
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    values = [index * step for index in range(first, last + 1)]
    return (values[0], values[-1]), values


def tick_text(values: Sequence[float]) -> list[tuple[float, str]]:
    """Each value as short as its neighbours allow."""
    step = values[1] - values[0] if len(values) > 1 else 1.0
    size = max(map(abs, values), default=0.0)
    if size >= 1e5 or 0 < size < 1e-3:
        return [
            (value, f"{value:.2g}".replace("e-0", "e−").replace("e+0", "e")) for value in values
        ]
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step < 1 else 0
    digits += step * 10**digits % 1 > 1e-6
    return [(value, f"{value:.{digits}f}".replace("-", "−")) for value in values]


def share_ticks(low: float = 0.0, high: float = 1.0) -> tuple[tuple[float, float], list]:
    """Ticks in per cent."""
    span, values = ticks(low, high)
    if (low, high) == (0.0, 1.0):
        span, values = (0.0, 1.0), [0, 0.25, 0.5, 0.75, 1]
    return span, [(value, f"{100 * value:.4g}{NO_BREAK}%") for value in values]


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _overlap(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)
