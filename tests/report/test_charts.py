"""Charts: where marks lie, what their ticks say, and the SVG files that they become."""

import math
import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jexit.report.charts import Axis, Chart, Text, as_file, round_ticks, text_width, tick_texts
from jexit.report.rendering import number, per_cent, points, printable


def make_chart(x=(0.0, 10.0)):
    return Chart("Title", Axis("x", x, tick_texts([0, 5, 10])), Axis.of_shares("y"), note="Note.")


def pairs(d):
    return [tuple(map(float, pair.split())) for pair in re.split("[ML]", d.rstrip("Z"))[1:]]


def test_marks_lie_where_their_values_say():
    chart = make_chart()
    assert (chart.x(0), chart.x(10)) == (chart.left, chart.right)
    assert (chart.y(0), chart.y(1)) == (chart.bottom, chart.top)
    chart.curve([0, 5, 10], [0, 1, 0.5], "a")
    chart.across((2, 8), 0.5, "b")
    chart.upright(5, (0.25, 0.75), "c")
    chart.curve([0, 1, 2, 3], [0.1, math.nan, 0.2, 0.3], "gap")
    chart.upright(1, (math.nan, 0.4), "none")
    chart.band([0, 10], [0.0, math.nan], [0.5, 1.0], "band")
    drawn = {shape.classes: shape for shape in chart.shapes}
    expected = [(chart.x(x), chart.y(y)) for x, y in ((0, 0), (5, 1), (10, 0.5))]
    for place, wanted in zip(pairs(drawn["a"].d), expected, strict=True):
        assert place == pytest.approx(wanted, abs=0.06)
    assert drawn["error b"].d.startswith(f"M{chart.x(2):.1f} {chart.y(0.5):.1f}H{chart.x(8):.1f}")
    assert drawn["error c"].d.startswith(
        f"M{chart.x(5):.1f} {chart.y(0.25):.1f}V{chart.y(0.75):.1f}"
    )
    assert drawn["gap"].d.count("M") == 2 and "nan" not in drawn["gap"].d  # a gap stays one
    assert "error none" not in drawn and len(pairs(drawn["band"].d)) == 3


def test_the_pointer_finds_the_nearest_value_everywhere():
    chart = make_chart()
    chart.told_at([(0, "first"), (2, "second"), (10, "third")])
    told = [shape for shape in chart.shapes if shape.classes == "told"]
    spans = [tuple(map(float, re.findall(r"M([\d.]+) .*H([\d.]+)V", t.d)[0])) for t in told]
    edges = [chart.left, chart.x(1), chart.x(6), chart.right]
    assert [t.title for t in told] == ["first", "second", "third"]
    for span, wanted in zip(spans, pairwise(edges), strict=True):
        assert span == pytest.approx(wanted, abs=0.06)


def test_labels_keep_off_each_other_and_stand_beside_their_points():
    for places in (
        [(0.5, 0.5), (0.52, 0.5), (0.5, 0.53), (1.0, 1.0), (1.0, 0.98), (0.01, 0.0)],
        [(0.2, 1.0), (0.201, 1.0), (0.2, 1.0), (0.202, 1.0), (1.0, 1.0)],
        [(0.8, 0.0)] * 6,
    ):
        chart = make_chart(x=(0.0, 1.0))
        for x, y in places:
            chart.point(x, y, "circle", "s0")
        chart.label_points([(x, y, f"threshold:0.{i}", "s0") for i, (x, y) in enumerate(places)])
        texts = [s for s in chart.shapes if isinstance(s, Text) and "name" in s.classes]
        assert len(texts) == len(places)
        lefts = [t.x - text_width(t.text) * (t.anchor == "end") for t in texts]
        boxes = [
            (left, t.y - 9, left + text_width(t.text), t.y + 3)
            for left, t in zip(lefts, texts, strict=True)
        ]
        for index, (left, top, right, bottom) in enumerate(boxes):
            assert left >= chart.left and right <= chart.width and bottom <= chart.bottom
            for other in boxes[:index]:
                across = min(right, other[2]) - max(left, other[0])
                down = min(bottom, other[3]) - max(top, other[1])
                assert across <= 0 or down <= 0, texts[index].text
    chart, places = make_chart(x=(0.0, 1.0)), {"a": (0.5, 0.5), "b": (0.505, 0.5), "c": (0.9, 0.5)}
    chart.label_points([(*place, text, "s0") for text, place in places.items()])
    at = {s.text: (s.x, s.y) for s in chart.shapes if isinstance(s, Text) and "name" in s.classes}
    assert at["b"] == (at["a"][0], at["a"][1] + 12)  # those of one place stand in a block
    assert all(abs(at[text][0] - chart.x(places[text][0])) < 20 for text in "ac")


@example(0.0, 5e-324, False)
@example(1e-310, 0.0, False)
@given(st.floats(-1e6, 1e6), st.floats(0, 1e6), st.booleans())
def test_ticks_span_the_values_evenly(low, width, whole):
    (first, last), values = round_ticks(low, low + width, whole=whole)
    assert (first, last) == (values[0], values[-1])
    assert 2 <= len(values) <= 9
    near = 1e-6 * (values[1] - values[0])
    assert first <= low + near and last >= low + width - near
    steps = [b - a for a, b in pairwise(values)]
    assert max(steps) - min(steps) < 1e-6 * max(abs(first), abs(last), steps[0])
    assert not whole or all(value == int(value) for value in values)


def test_texts_of_ticks_and_numbers():
    for values, texts in (
        ([0, 50, 100], ["0", "50", "100"]),
        ([-0.5, 0.0, 0.5], ["−0.5", "0.0", "0.5"]),
        ([0, 2.5, 5], ["0.0", "2.5", "5.0"]),
        ([0, 0.0005], ["0", "0.0005"]),
    ):
        assert [text for _, text in tick_texts(values)] == texts
    assert number(1234567.891, 1) == "1\u202f234\u202f567.9" and number(-0.25) == "−0.25"
    assert per_cent(0.9734) == "97.3\u00a0%"
    assert [points(v) for v in (0.054, -0.054, 0.0)] == ["+5.4", "−5.4", "0.0"]
    for unknown in (None, math.nan, math.inf):
        assert number(unknown) == per_cent(unknown) == points(unknown) == "–"


def test_a_file_is_an_svg_with_titles_and_legends_for_light_and_dark():
    charts = [make_chart() for _ in range(3)]
    charts[0].explain("a <line> & more", "curve s0")
    charts[0].point(5, 0.5, "open-diamond", "s1", "what it\nsays")
    charts[1].title = "All \x1b"
    text = as_file(charts, columns=2)
    root = ET.fromstring(text)
    texts = ["".join(node.itertext()) for node in root.iter() if node.tag.endswith("}text")]
    assert texts.count("Title") == 2 and texts.count("Note.") == 3
    assert {"a <line> & more", "All \\x1b"} <= set(texts)
    (style,) = (node.text for node in root if node.tag.endswith("}style"))
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    assert "var(" not in style  # programs that know no variables draw it, too
    assert ".grid { stroke: #e3e6e8; }" in light and ".grid { stroke: #2c3338; }" in dark
    left, top, width, height = map(float, root.attrib["viewBox"].split())
    for group in (node for node in root if node.tag.endswith("}g")):
        x, y = map(float, re.findall(r"[\d.]+", group.attrib["transform"]))
        assert left <= x <= left + width and top <= y <= top + height


@given(st.text(st.characters(exclude_categories=())))
def test_any_text_can_be_written_and_what_cannot_is_shown(text):
    shown = printable(text)
    ET.fromstring(f"<p>{shown.replace('&', '&amp;').replace('<', '&lt;')}</p>".encode())
    assert printable("\x00\x9f\t\n\ud83dé😀") == "\\x00\\x9f\t\n\ufffdé😀"
    assert printable(shown) == shown
