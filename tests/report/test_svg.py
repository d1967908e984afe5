"""Charts: where marks lie, what their ticks say."""

import math
import re
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jexit.report.svg import Chart, share_ticks, text_width, tick_text, ticks
from parsed_page import parse


def make_chart(**settings):
    plain = {
        "x": (0.0, 10.0),
        "y": (0.0, 1.0),
        "x_label": "x",
        "y_label": "y",
        "x_ticks": tick_text([0, 5, 10]),
        "y_ticks": share_ticks()[1],
    }
    return Chart("Title", **(plain | settings))


def test_marks_lie_where_their_values_say():
    chart = make_chart()
    assert (chart.x(0), chart.x(10)) == (chart.left, chart.right)
    assert (chart.y(0), chart.y(1)) == (chart.bottom, chart.top)
    assert chart.x(5) == pytest.approx((chart.left + chart.right) / 2)
    chart.curve([0, 5, 10], [0, 1, 0.5], "curve s0")
    chart.errors(5, 0.5, "s1", across=(2, 8), up=(0.25, 0.75))
    figure = parse(chart.figure())
    (d,) = [path.attributes["d"] for path in figure.all("path", class_="curve s0")]
    numbers = [tuple(map(float, pair.split())) for pair in re.split("[ML]", d)[1:]]
    for (x, y), (value_x, value_y) in zip(numbers, [(0, 0), (5, 1), (10, 0.5)], strict=True):
        assert (x, y) == pytest.approx((chart.x(value_x), chart.y(value_y)), abs=0.06)
    across, up = (path.attributes["d"] for path in figure.all("path", class_="error s1"))
    assert across.startswith(f"M{chart.x(2):.1f} {chart.y(0.5):.1f}H{chart.x(8):.1f}")
    assert up.startswith(f"M{chart.x(5):.1f} {chart.y(0.25):.1f}V{chart.y(0.75):.1f}")


def test_a_value_that_is_not_finite_leaves_a_gap():
    chart = make_chart()
    chart.curve([0, 1, 2, 3], [0.1, math.nan, 0.2, 0.3], "curve")
    d = parse(chart.figure()).all("path", class_="curve")[0].attributes["d"]
    assert d.count("M") == 2 and d.count("L") == 1 and "nan" not in d
    chart.errors(1, 0.5, "s0", up=(math.nan, 0.4), across=(0.1, math.inf))
    assert not parse(chart.figure()).all("path", class_="error s0")


def test_readers_who_do_not_see_it_are_told_what_it_shows():
    figure = parse(make_chart(note="What it means.").figure())
    svg = figure.one("svg", role="img")
    assert svg.attributes["aria-label"] == "Title. What it means."
    assert figure.one("figcaption").text == "TitleWhat it means."


@pytest.mark.parametrize(
    "places",
    [
        [(0.5, 0.5), (0.52, 0.5), (0.5, 0.53), (1.0, 1.0), (1.0, 0.98), (0.01, 0.0)],
        [(0.2, 1.0), (0.201, 1.0), (0.2, 1.0), (0.202, 1.0), (1.0, 1.0)],
        [(0.8, 0.0)] * 6,
    ],
    ids=["spread", "at the top", "at the bottom"],
)
def test_labels_keep_off_each_other_and_inside(places):
    chart = make_chart(x=(0.0, 1.0))
    for x, y in places:
        chart.marker(x, y, "circle", "s0", "told")
    chart.label_points([(x, y, f"threshold:0.{i}", "s0") for i, (x, y) in enumerate(places)])
    texts = [t for t in parse(chart.figure()).all("text") if "name" in t.classes]
    assert len(texts) == len(places)
    boxes = []
    for text in texts:
        x, y = float(text.attributes["x"]), float(text.attributes["y"])
        boxes.append((x, y - 9, x + text_width(text.text), y + 3))
    for index, (left, top, right, bottom) in enumerate(boxes):
        assert left >= chart.left and right <= chart.width and bottom <= chart.bottom
        for other in boxes[:index]:
            across = min(right, other[2]) - max(left, other[0])
            down = min(bottom, other[3]) - max(top, other[1])
            assert across <= 0 or down <= 0, texts[index].text


def test_labels_of_points_that_lie_on_each_other_stand_in_one_block():
    chart = make_chart(x=(0.0, 1.0))
    points = [
        (0.5, 0.5, "a", "s0"),
        (0.505, 0.5, "b", "s0"),
        (0.5, 0.5, "c", "s1"),
        (0.9, 0.5, "d", "s0"),
    ]
    chart.label_points(points)
    texts = {t.text: t.attributes for t in parse(chart.figure()).all("text") if "name" in t.classes}
    at = {text: (float(where["x"]), float(where["y"])) for text, where in texts.items()}
    assert at["b"] == (at["a"][0], at["a"][1] + 12)
    assert len(set(at.values())) == 4
    assert abs(at["a"][0] - chart.x(0.5)) < 40 and abs(at["d"][0] - chart.x(0.9)) < 40


@example(0.0, 5e-324, False)
@example(1e-310, 0.0, False)
@given(
    st.floats(-1e6, 1e6),
    st.floats(0, 1e6),
    st.booleans(),
)
def test_ticks_span_the_values_evenly(low, width, whole):
    (first, last), values = ticks(low, low + width, whole=whole)
    assert (first, last) == (values[0], values[-1])
    assert 2 <= len(values) <= 9
    near = 1e-6 * (values[1] - values[0])
    assert first <= low + near and last >= low + width - near
    steps = [b - a for a, b in pairwise(values)]
    assert max(steps) - min(steps) < 1e-6 * max(abs(first), abs(last), steps[0])
    if whole:
        assert all(value == int(value) for value in values)


@pytest.mark.parametrize(
    "values, texts",
    [
        ([0, 50, 100], ["0", "50", "100"]),
        ([-0.5, 0.0, 0.5], ["−0.5", "0.0", "0.5"]),
        ([0, 0.25, 0.5], ["0.00", "0.25", "0.50"]),
        ([0, 2.5, 5], ["0.0", "2.5", "5.0"]),
        ([0, 0.0005], ["0", "0.0005"]),
    ],
)
def test_texts_of_ticks(values, texts):
    assert [text for _, text in tick_text(values)] == texts


def test_shares_have_quarters_and_per_cent():
    span, found = share_ticks()
    assert span == (0.0, 1.0)
    assert [text for _, text in found] == [f"{n}\u00a0%" for n in (0, 25, 50, 75, 100)]
